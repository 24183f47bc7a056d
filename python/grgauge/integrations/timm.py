"""timm's optimizer factory makes a `grgauge.AdamW` by the name "grgauge"; importing this module registers it.

import grgauge.integrations.timm
optimizer = timm.optim.create_optimizer_v2(model, "grgauge", lr=1e-3)
"""

from __future__ import annotations

from ..optim import AdamW

try:
    from timm.optim import OptimInfo
    from timm.optim._optim_factory import default_registry  # timm.optim itself exports no way to add to it
except (ImportError, RuntimeError) as error:  # the latter from a torchvision for another build of torch
    raise ImportError(
        "grgauge.integrations.timm needs timm 1.0.12 or newer, with the torchvision of the installed torch "
        f"({error}): pip install 'grgauge-kernels[timm]'"
    ) from error

default_registry.register(
    OptimInfo(name="grgauge", opt_class=AdamW, description="AdamW whose step also reads the gauges", has_betas=True)
)
