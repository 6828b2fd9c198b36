"""The demo: one small video diffusion transformer, trained on a real clip with dense, VSA and BSA attention.

Index: `settings` what a run is told; `data` windows; `model` the transformer in plain PyTorch; `methods` dense, VSA,
BSA; `train` the loop; `folder` what is kept on disk; `measure` numbers; `figures`, `page`, `report` the report;
`summary` the terminal; `run` all of it. What fine-tuning needs too is in `flexsparse.training`. Needs the extra `demo`;
only the command line imports it.
"""
