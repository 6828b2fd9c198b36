"""Fine-tuning with sparse attention, on accelerate: the command `flexsparse finetune` as a small library.

>>> finetune(Settings(model="Wan2.1/transformer", data="clips", vae="Wan2.1/vae"), Options(folder=Path("runs/a")), Console())

Index: `settings` what a run is told; `clips` files; `samples` which is trained when, and what is held out; `inputs` what a
model is given; `families` how each class is called; `objectives` what it learns; `model` the model and the VAE; `launch`
accelerate; `train` the loop; `interrupts` signals; `state` and `saving` checkpoints; `export` weights; `run` all of it;
`parse`, `summary` the terminal. Needs the extra `finetune`; only the command line imports it.
"""

from flexsparse.finetune.inputs import Batch, Family
from flexsparse.finetune.run import Result, finetune
from flexsparse.finetune.settings import Options, Settings
from flexsparse.training.errors import RunError

__all__ = ["Batch", "Family", "Options", "Result", "RunError", "Settings", "finetune"]
