"""From a model and a recipe to an artifact: the one in the cache, or one that is built now. No torch.

    texts ─► choose (auto) ─► quantize ─► check ─► gate ─► renamed into place

Every arrow is a stage that is recorded once its files are on disk; after a kill the next start goes on behind the last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from optimize.artifact import (
    MANIFEST,
    Artifact,
    ArtifactKey,
    ArtifactStore,
    Build,
    DamagedError,
    described,
    sync,
    write_json,
)
from optimize.errors import OptimizeError, RefusedError
from optimize.options import OptimizeOptions
from optimize.plan import plan_layers
from optimize.progress import Bar
from optimize.ptq.job import CHOICE, Job
from optimize.ptq.jsonl import check_file
from optimize.recipe_file import load_recipe, recipe_fields
from optimize.stage_runner import MODELOPT, ChildStages, RunStage, Say, require_libraries
from server.config import ConfigError
from server.models.source import ModelSource, load_index, resolve
from server.routing.verdict import read_verdict

BUILDER_VERSION = 1
"""Part of every key: raised when the same recipe is to give other bytes."""
LOG = "log.txt"
PAGE = "report.html"
"""What the gate writes beside the weights (and `report.json`)."""


class Builder:
    """Makes or finds one artifact. `stages` runs a stage (None: child processes)."""

    def __init__(
        self,
        options: OptimizeOptions,
        say: Say,
        *,
        store: ArtifactStore | None = None,
        stages: RunStage | None = None,
        show: Callable[[str, float], None] | None = None,
    ) -> None:
        self.options, self.say = options, say
        self.recipe = load_recipe(options.recipe)
        self.store = store or ArtifactStore()
        self._stages = stages
        self._show = show or Bar()
        self._check_calibration()

    def artifact(self) -> Artifact:
        """Raises OptimizeError, RefusedError where the gate says no, ConfigError, ModelSourceError and OSError."""
        source = resolve(self.options.model)
        plan_layers(self.recipe, source)  # what cannot work is refused before anything is loaded
        key = self.key(source)
        found = self._find(key)
        if found is None:
            with self.store.building(key, self._show) as build:
                found = self._find(key)  # whoever held the lock may have built it
                if found is None:
                    found = self._build(build, key)
        if not self.options.skip_gate and not self._is_judged(found.manifest.get("gate")):
            found = self._gate_late(key)
        if self.options.out is not None:
            copy_artifact(found, self.options.out)
        return found

    def key(self, source: ModelSource) -> ArtifactKey:
        """What the artifact is a function of."""
        files = sorted({entry.file for entry in load_index(source.directory).values()})
        names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
        files += [path for name in names if (path := source.directory / name).is_file()]
        fields = {k: v for k, v in recipe_fields(self.recipe).items() if k not in ("description", "gate")}
        text = self.options.calibration
        parts: dict[str, Any] = {
            "builder": BUILDER_VERSION,
            "config": source.config,
            "files": {path.name: self.store.file_hash(path) for path in files},
            "recipe": fields,
            "text": None if text is None else self.store.file_hash(text),
            "calibrated_in": [self.options.device, self.options.dtype] if self.recipe.needs_text else None,
            "versions": {
                "nvidia-modelopt": MODELOPT,
                "torch": _version("torch"),
                "transformers": _version("transformers"),
            },
        }
        return ArtifactKey(f"{source.name}-{self.recipe.name}", parts)

    def _find(self, key: ArtifactKey) -> Artifact | None:
        if self.options.rebuild:
            return None
        try:
            return self.store.load(self.store.path(key))
        except FileNotFoundError:
            return None
        except DamagedError as error:
            self.say(f"{error}; building it anew")
            return None

    def _build(self, build: Build, key: ArtifactKey) -> Artifact:
        if self._stages is None:
            require_libraries()
        if self.options.rebuild:
            build.restart()
        job = self._job(build)
        try:
            results = {name: self._stage(build, job, name) for name in self._stage_names()}
        except OSError:
            _give_back(build)
            raise
        except OptimizeError:
            if build.done("quantize") is None:
                _give_back(build)
            raise
        if not self._is_judged(build.done("gate")):
            build.stages.pop("gate", None)
        verdict = None if self.options.skip_gate else self._stage(build, job, "gate")
        if verdict is not None and not verdict["passed"]:
            raise self._refused(verdict, build.content)
        manifest: dict[str, Any] = {"name": key.name, "model": self.options.model, "recipe": recipe_fields(self.recipe)}
        manifest |= {"key": key.parts, "stages": results, "gate": verdict}
        return build.finish(manifest, lambda path: self.store.file_hash(path))

    @property
    def _thresholds(self) -> dict[str, Any]:
        """No part of an artifact's key: other ones judge the same weights."""
        return dict(recipe_fields(self.recipe)["gate"])

    def _is_judged(self, verdict: dict[str, Any] | None) -> bool:
        """Whether that is a verdict by this recipe's thresholds."""
        return verdict is not None and verdict.get("thresholds") == self._thresholds

    def _stage(self, build: Build, job: Job, name: str) -> Any:
        """What the stage recorded, or records now."""
        done = build.done(name)
        if done is not None:
            return done

        def show(what: str, fraction: float) -> None:
            self._show(what, fraction)
            build.show(what, fraction)

        run = self._stages or ChildStages(build.directory / LOG, self.options.nice)
        done = run(name, job, show, self.say)
        if name == "choose":
            write_json(Path(job.work) / CHOICE, done)
        if name == "gate":
            done = {**done, "thresholds": self._thresholds}
        build.record(name, done)
        return done

    def _stage_names(self) -> list[str]:
        names = ["texts"] if self.recipe.needs_text else []
        return [*names, *(["choose"] if self.recipe.method == "auto" else []), "quantize", "check"]

    def _job(self, build: Build) -> Job:
        o = self.options
        text = None if o.calibration is None else str(o.calibration.resolve())
        fields, content, work = recipe_fields(self.recipe), str(build.content), str(build.directory)
        return Job(o.model, fields, content, work, text, o.device, o.device_map, o.dtype)

    def _gate_late(self, key: ArtifactKey) -> Artifact:
        """An artifact that was built without the gate, or met another one, meets it before it is used."""
        with self.store.building(key, self._show) as build:
            found = self.store.load(self.store.path(key))
            if not self._is_judged(found.manifest.get("gate")):  # whoever held the lock may have done it
                found = self._gated(found, build)
            shutil.rmtree(build.directory)
        return found

    def _gated(self, found: Artifact, build: Build) -> Artifact:
        run = self._stages or ChildStages(build.directory / LOG, self.options.nice)
        verdict = run("gate", replace(self._job(build), content=str(found.directory)), self._show, self.say)
        if not verdict["passed"]:
            raise self._refused(verdict, found.directory)
        manifest = {**found.manifest, "gate": {**verdict, "thresholds": self._thresholds}}
        manifest["files"] = described(found.directory, self.store.file_hash)
        write_json(found.directory / MANIFEST, manifest)
        return Artifact(found.directory, manifest)

    def _refused(self, verdict: dict[str, Any], directory: Path) -> RefusedError:
        """Tells what to try and where the report is; the error says which number failed."""
        for line in verdict.get("advice", ()):
            self.say(f"to try: {line}")
        report = directory / PAGE
        where = f"; report: {report}" if report.is_file() else ""
        again = "" if self.options.rebuild else "; --rebuild measures again"
        return RefusedError(f"the quantised model is refused: {'; '.join(verdict['reasons'])}{where}{again}")

    def _check_calibration(self) -> None:
        recipe, text = self.recipe, self.options.calibration
        wants = recipe.needs_text and recipe.calibration.source in ("file", "both")
        if wants and text is None:
            raise ConfigError(f"calibration: missing; source {recipe.calibration.source!r} of the recipe needs a file")
        if text is not None and not wants:
            why = "needs no text" if not recipe.needs_text else "has calibration.source 'self'; use 'file' or 'both'"
            raise ConfigError(f"calibration: {str(text)!r} is not valid: recipe {recipe.name} {why}")
        if text is not None:
            check_file(text)


def copy_artifact(artifact: Artifact, out: Path) -> None:
    """Puts the files into `out`, all at once: links where the file system can, else copies.

    Raises ConfigError where `out` holds something that is no artifact.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ConfigError(f"out: {str(out)!r} is not valid; it holds other files, use an empty or a new directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (out.parent / f".{out.name}.{word}-{os.getpid()}" for word in ("new", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for path in artifact.directory.iterdir():
            try:
                (temporary / path.name).hardlink_to(path)
            except OSError:
                shutil.copyfile(path, temporary / path.name)
        sync(temporary)
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _give_back(build: Build) -> None:
    """A half-written model is of no use, and the disk may be full."""
    shutil.rmtree(build.content, ignore_errors=True)
    try:
        build.content.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptimizeError(f"{build.content}: {error.strerror or error}") from error


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def describe(artifact: Artifact) -> str:
    """One line for people."""
    formats = ", ".join(artifact.manifest["stages"]["quantize"].get("formats", []))
    words = [f"{formats}, {artifact.size / 1e6:,.1f} MB", *_judged(artifact.manifest)]
    verdict = read_verdict(artifact.directory)
    if verdict.status:
        words.append(f"{verdict.status.replace('_', ' ')} on {verdict.at} ({verdict.reason})")
    return f"{artifact.directory.name}: {', '.join(words)}"


def _judged(manifest: dict[str, Any]) -> list[str]:
    gate, check = manifest.get("gate"), manifest["stages"].get("check", {})
    if gate is None:
        ratio = check.get("perplexity_ratio")
        return [*([] if ratio is None else [f"perplexity ratio {ratio:.4f} on a sample"]), "not gated"]
    numbers = [
        f"{name} at worst {value:.4f}"
        for name, value in gate.get("numbers", {}).items()
        if name in ("perplexity ratio", "top-1 agreement") and value is not None
    ]
    return ["passed the gate", *numbers]
