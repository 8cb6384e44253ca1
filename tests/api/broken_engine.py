"""An engine process with a bug in verification: the first draft of a row stands, whatever the model says."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import Tensor

from server.engine.process import main
from server.spec import verify
from server.spec.types import Drafts, Layout, Verdict

right = verify._match


def wrong(target: Tensor, layout: Layout, drafts: Drafts) -> Verdict:
    """As `verify._match`, with the model's first token replaced by the draft."""
    if layout.width > 1:
        first = layout.offsets == 0
        target = target.clone()
        target[first] = drafts.tokens[:, 0].where(drafts.num_valid > 0, target[first])
    return right(target, layout, drafts)


verify._match = wrong

if __name__ == "__main__":
    sys.exit(main())
