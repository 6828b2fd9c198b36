"""Looking at what a wrapped model attends to.

Index: `capture` watches sparse calls as they run; `measures` density, recall and overlap of a selection; `inspection` a whole
model's; `inputs` what a model is called with; `sources` model, clip and latents from files; `page` the HTML page.
"""

from flexsparse.analysis.capture import SparseCall, watch
from flexsparse.analysis.inspection import Inspection, LayerView, inspect, view
from flexsparse.analysis.measures import head_density, overlap, recall, row_density, sample_rows, tile_mass

__all__ = [
    "Inspection",
    "LayerView",
    "SparseCall",
    "head_density",
    "inspect",
    "overlap",
    "recall",
    "row_density",
    "sample_rows",
    "tile_mass",
    "view",
    "watch",
]
