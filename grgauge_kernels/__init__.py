"""Fused gradient-metric kernels: one pass over flat or loose gradient buckets.

measure_   the six sums of each segment, and the gauges' two optional states
adamw_     the same sums, taken while AdamW has the gradient in a register anyway
"""

from .backends.cpu import isa as cpu_isa
from .bucket import CHUNK, DTYPES, Bucket, Plan, is_dense, require_dense
from .flat import FlatBuckets, flat_views
from .ops import PREFERRED_BACKENDS, STATS, adamw_, backends, measure_, prepare_adamw_
from .sampling import REPLICATES, sampled_ratio, sampled_sums
from .stream import Stream

__all__ = [
    "CHUNK",
    "DTYPES",
    "PREFERRED_BACKENDS",
    "REPLICATES",
    "STATS",
    "Bucket",
    "FlatBuckets",
    "Plan",
    "Stream",
    "adamw_",
    "backends",
    "cpu_isa",
    "flat_views",
    "is_dense",
    "measure_",
    "prepare_adamw_",
    "require_dense",
    "sampled_ratio",
    "sampled_sums",
]
