"""Fused gradient-metric kernels: one pass over flat or loose gradient buckets.

measure_   the six sums of each segment, and the gauges' two optional states
adamw_     the same sums, taken while AdamW has the gradient in a register anyway
"""

from .bucket import CHUNK, Bucket, Plan
from .flat import FlatBuckets
from .ops import STATS, adamw_, backends, measure_

__all__ = ["CHUNK", "STATS", "Bucket", "FlatBuckets", "Plan", "adamw_", "backends", "measure_"]
