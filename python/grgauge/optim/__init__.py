"""AdamW whose step also takes the gauges' sums.

AdamW      torch.optim.AdamW's semantics; one kernel call for all parameters of a group that share a device and a dtype
"""

from .adamw import AdamW, unwrapped
from .param_bucket import ALIGN, BucketSums, Unclipped, averaged, is_sharded, local, reciprocal

__all__ = ["ALIGN", "AdamW", "BucketSums", "Unclipped", "averaged", "is_sharded", "local", "reciprocal", "unwrapped"]
