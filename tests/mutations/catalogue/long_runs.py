"""Bugs that only show in long runs: what threads share, and what is kept."""

from __future__ import annotations

from tests.mutations.catalogue.mutation import Mutation

LONG_RUNS: tuple[Mutation, ...] = (
    Mutation(
        "a short video makes those of other threads dense",
        "wrapped.py",
        "before, local.dense = local.dense, True",
        "before, self.dense = self.dense, True",
        ("wrap/test_dense_unseen.py", "-k", "other_threads"),
    ),
    Mutation(
        "torch keeps the graphs of models that are gone",
        "forms.py",
        "weakref.finalize(self, forget, self.codes).atexit = False",
        "weakref.finalize(self, forget, [])",
        ("wrap/test_gone.py", "-m", "slow or not slow"),
    ),
    Mutation(
        "torch's list of backends keeps them",
        "one_graph.py",
        "            cached.pop(key, None)",
        "            pass",
        ("wrap/test_gone.py", "-m", "slow or not slow"),
    ),
    Mutation(
        "every call leaves context variables behind",
        "one_graph.py",
        "duck = set_to(torch.fx.experimental._config, use_duck_shape=False)",
        "duck = torch.fx.experimental._config.patch(use_duck_shape=False)",
        ("wrap/test_gone.py",),
    ),
    Mutation(
        "a backward that failed is still running",
        "redone.py",
        "weakref.finalize(end, end.tasks.pop, task, None).atexit = False",
        "end.tasks",
        ("wrap/test_redone.py", "-k", "failed"),
    ),
    Mutation(
        "what was given is kept without bound",
        "redone.py",
        "for key in list(given)[: max(0, len(given) - MOST)]:",
        "for key in ():",
        ("wrap/test_redone.py", "-k", "slices"),
    ),
)
