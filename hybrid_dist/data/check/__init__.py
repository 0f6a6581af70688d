"""Everything that is wrong with a data set, told before a GPU is rented: tables, folders, pictures, copies.

Nothing here imports torch, and nothing writes.
"""

from hybrid_dist.data.check.findings import EXAMPLES, Example, Finding, Place
from hybrid_dist.data.check.run import DataCheck, check_data

__all__ = ["EXAMPLES", "DataCheck", "Example", "Finding", "Place", "check_data"]
