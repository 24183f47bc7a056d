"""`timm.optim.create_optimizer_v2(model, "grgauge")` makes a `grgauge.AdamW`; one line registers it.

import grgauge.integrations.timm
"""

from __future__ import annotations

from ..optim import AdamW

try:
    from timm.optim import OptimInfo, default_registry
except ImportError as error:
    raise ImportError(
        f"grgauge.integrations.timm needs timm 1.0.12 or newer, with torchvision: {error}; pip install "
        "'grgauge-kernels[timm]'"
    ) from error

default_registry.register(
    OptimInfo(
        name="grgauge", opt_class=AdamW, description="AdamW whose step also takes the gauges' sums", has_betas=True
    )
)
