"""The demo: one small video diffusion transformer, trained on a real clip with dense, VSA and BSA attention.

Index: `settings` what a run is told; `video` decoding; `data` windows; `model` the transformer in plain
PyTorch; `flow` flow matching; `methods` dense, VSA, BSA; `train` the loop; `checkpoint`, `files`, `folder`
what is kept on disk; `measure` numbers; `figures`, `page`, `report` the report; `progress`, `summary` the
terminal; `run` all of it. Needs the extra `demo`; only the command line imports it.
"""
