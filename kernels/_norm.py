"""Transitional."""

from ._row_norm import Norm as Norm
from ._row_norm import RowNorm as RowNorm
from ._row_norm import check_norm as check_norm
