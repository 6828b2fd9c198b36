"""Bugs in what training loops meet: shells around models, blocks that backward redoes, references."""

from tests.mutations.catalogue.mutation import Mutation

TRAINING = (
    Mutation(
        "every rank trains gates of its own under DDP",
        "gates.py",
        "if any(parameter.requires_grad and id(parameter) not in known for parameter in gate.parameters()):",
        "if False:",
        ("distributed/test_training.py", "-k", "train_alone"),
    ),
    Mutation(
        "FSDP1 is not seen",
        "gates.py",
        'return any(isinstance(p, FlatParameter) or getattr(p, "_fsdp_flattened", False) for p in model.parameters())',
        "return False",
        ("distributed/test_training.py", "-k", "train_alone"),
    ),
    Mutation(
        "a module does not tell which forward comes in backward",
        "intercept.py",
        "self.redone.tell(out, local.ran)",
        "pass",
        ("wrap/test_redone.py", "-k", "not regional"),
    ),
    Mutation(
        "a video that a module is given is no reference",
        "crossing.py",
        "if isinstance(x, Tensor) and x.dim() == 5:",
        "if False:",
        ("wrap/test_crossing.py",),
    ),
    Mutation(
        "another thread that compiles leaves redone blocks dense",
        "tables.py",
        "return torch.compiler.is_dynamo_compiling() or is_exporting()",
        "return torch.compiler.is_compiling()",
        ("wrap/test_redone.py", "-k", "another_thread"),
    ),
    Mutation(
        "a part of a builder replaced goes unseen",
        "builder_state.py",
        "(part or isinstance(value, (*PLAIN, Tensor)) or callable(value))",
        "isinstance(value, (*PLAIN, Tensor))",
        ("wrap/test_builder_state.py",),
    ),
    Mutation(
        "a cache that fills up is a change",
        "builder_state.py",
        "found[name] = Maybe(value) if maybe else value",
        "found[name] = value",
        ("wrap/test_builder_state.py",),
    ),
    Mutation(
        "a rank waits for another whose share of PerHead does not fit",
        "distributed/around.py",
        "if heads is not None and q.shape[1] != heads:",
        "if False:",
        ("distributed/test_models.py", "-k", "builder_of_other"),
    ),
    Mutation(
        "DDP has graphs split at its buckets",
        "one_graph.py",
        'ddp = "no_optimization" if splits_graphs()',
        'ddp = "no_optimization" if False',
        ("distributed/test_training.py", "-k", "two_ranks and ddp-regional"),
    ),
    Mutation(
        "ranks that hold one video are given several",
        "distributed/around.py",
        "            check_same_inputs(",
        "            (lambda *_: None)(",
        ("distributed/test_models.py", "-k", "other_inputs and values"),
    ),
    Mutation(
        "parts of flat tensors saved as gates",
        "gate_files.py",
        "weight is None or weight.dim() != 2",
        "weight is None",
        ("distributed/test_training.py", "-k", "gate_files"),
    ),
    Mutation(
        "no rank writes gates that are sharded",
        "gate_files.py",
        "first = first and not (_is_sharded(value) and torch.distributed.get_rank())",
        "first = first and not _is_sharded(value)",
        ("distributed/test_training.py", "-k", "gate_files"),
    ),
    Mutation(
        "a parametrised gate saved by its parts",
        "gate_files.py",
        'in _values(f"{name}.{own}".lstrip("."), gate):',
        "in gate.state_dict().items():",
        ("wrap/test_gates.py", "-k", "parametrised"),
    ),
)
