"""Networks side by side: accuracy, executed multiply-adds and time, each as it is deployed."""

from typing import TYPE_CHECKING

from dgnet._lazy import lazy_names

if TYPE_CHECKING:
    from dgnet.comparison._compare import Compared as Compared
    from dgnet.comparison._compare import Comparison as Comparison
    from dgnet.comparison._compare import Timing as Timing
    from dgnet.comparison._compare import compare as compare
    from dgnet.comparison._report import draw_comparison as draw_comparison
    from dgnet.comparison._report import format_comparison as format_comparison
    from dgnet.comparison._report import save_comparison as save_comparison
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
