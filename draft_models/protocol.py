"""What the engine asks of a drafter. Host events keep host-side drafters current; device calls run inside the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from server.kernels.paged import PagedRows
from server.sampling.state import SamplingBatch
from server.spec.device import CachedDrafts, DeviceStep
from server.spec.types import Carry, Drafts, Verdict


class Drafter(Protocol):
    """A drafter proposes tokens; verification decides. Nothing a drafter does can change the output.

    Host events (`admit`, `observe`, `release`) carry what the host knows, possibly one step late on a GPU.
    Device calls (`prefill`, `propose`, `commit`) run inside the step and must not synchronise on a GPU.
    """

    name: str
    feature_layers: tuple[int, ...]
    """0-based decoder layers whose *outputs* are fused into the carry's features (EAGLE-3: three); () for none."""
    has_distribution: bool
    """True if `Drafts.probs` can be filled, so that rule `ratio` has a q other than a point mass."""

    def admit(self, slot: int, token_ids: Sequence[int], prompt_len: int, prediction: Sequence[int] = ()) -> None:
        """A sequence took `slot`; `token_ids` are all its known tokens, the first `prompt_len` of them the prompt.

        `prediction` is what the client expects the answer to be, from its beginning on: to draft from, or to ignore.
        """

    def reuse(self, slot: int, first: int, end: int) -> None:
        """After `admit`: of the tokens that a prefix hit brought, `first` … `end` - 1 are the drafter's as well.

        Their blocks hold its keys and values; those of other tokens of the hit hold anything. Asked of drafters that
        keep some (`pools`); `admit_slots` says it to those on the device.
        """

    def observe(self, slot: int, token_ids: Sequence[int]) -> None:
        """`slot` emitted these tokens."""

    def release(self, slot: int, complete: bool = False) -> None:
        """`slot` is free again. `complete`: its sequence came to its natural end, it was not cancelled or preempted."""

    def prefill(
        self, carry: Carry, token_ids: Tensor, positions: Tensor, rows: Tensor, features: Tensor | None
    ) -> None:
        """The target ran a prompt chunk: `token_ids`, `positions`, `rows` are [N] int64, `features` [N, F].

        Not called while drafting is paused: chunks may be missing, from the first on.
        """

    def propose(self, carry: Carry, k: int, sampling: SamplingBatch) -> Drafts:
        """At most `k` drafts a row, and at most `carry.limits[r]` for row r."""

    def commit(self, carry: Carry, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        """Verification accepted a prefix: roll the drafter's own state to the committed end.

        `features` [R, width, F] are the target's features at the verified positions, None if not asked for. Also called
        after a step without drafts (width 1) if the drafter is to see it: while drafting is paused it is not, but for
        the last steps before drafts are tried again.
        """

    def pause(self) -> None:
        """Drafting stops; the drafter does not run, prefill included, until it is called again, and misses tokens.

        From then on it may draft from no other keys and values than right ones: tokens that it missed it computes
        itself (small LM), or looks at none before them (EAGLE).
        """


class KeepsFeatures(Protocol):
    """A drafter on the CPU that can close the gap that a pause leaves, from the features of the tokens it missed."""

    def keep(self, carry: Carry, counts: Sequence[int], features: Tensor) -> None:
        """While drafting is paused, instead of `prefill` and `commit`: of each row, `counts[r]` tokens were computed.

        `features` [N, F] are theirs, row after row, from token `carry.chunks[r][0]` on. To be kept, not computed with.
        """


class DeviceDrafter(Drafter, Protocol):
    """A drafter whose part of a step runs inside CUDA graphs: no host value but shapes, no synchronisation.

    `draft` is captured with the target's forward pass, `after_verify` with verification, one graph each per (rows, k).
    After steps without drafts nothing is called, but for drafters with `feature_layers`: `after_verify`, in a graph of
    its own, if the step's plan says that it follows. The host's part is `upload`, called just before the step is
    launched, when what the last step emitted is not known yet. `prefill` of the base protocol is replaced by
    `prefill_chunk`, which runs eagerly behind the target's.
    """

    def admit_slots(self, slots: Tensor, num_tokens: Tensor, cached: CachedDrafts | None = None) -> None:
        """The device's part of `admit`, for all sequences that came together and before it is called for each.

        Sequences with `num_tokens` [A] known tokens took `slots` [A], each once; both int64. `cached` says what of
        them prefix hits have brought (None: nothing). May be called more than once for the sequences of one step, and
        must not synchronise.
        """

    def upload_width(self, k: int) -> int:
        """Integers a row that the host sends with every step of `k` drafts; 0 for drafters that live on the device."""

    def upload(self, slots: Sequence[int], limits: Sequence[int], k: int) -> list[list[int]]:
        """`upload_width(k)` integers for each row; `limits` is the most drafts it may get."""

    def draft(self, step: DeviceStep, k: int) -> Drafts:
        """`k` >= 1 drafts a row [R, k] with `num_valid` <= `step.limits` on the device."""

    def after_verify(self, step: DeviceStep, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        """Verification accepted a prefix and `step.state` holds it; `features` [R, 1 + k, F] as in `commit`."""

    def prefill_chunk(self, step: DeviceStep, token_ids: Tensor, rows: PagedRows, features: Tensor | None) -> None:
        """The target ran prompt chunks: `token_ids` [N] int64 and `features` [N, F] of the ragged `rows`."""

    def resume(self, slots: Sequence[int], known: Sequence[Sequence[int]], seen: Sequence[int]) -> None:
        """Draft again for `slots`, which steps or chunks without drafts have left behind. Not for `feature_layers`.

        `known` are the tokens that the host knows of each; the step under way, which has no drafts, may emit one more,
        or some more if it copies them: those are of the next call.
        The first `seen` tokens of each were known when it fell behind; 0: part of its prompt was not shown.
        """
