"""Bugs of what a wrapped model is given, and of copies and parts of it."""

from tests.mutations.catalogue.mutation import Mutation

LIFE_CYCLE = (
    Mutation(
        "a region's arguments are detached one by one, also where two are one tensor",
        "wrapped.py",
        "x._base is not None and times[id(x)] == 1 and",
        "x._base is not None and",
        ("wrap/test_arguments.py", "-k", "given_one_tensor_twice or given_twice"),
    ),
    Mutation(
        "a region's lists are copied",
        "wrapped.py",
        "    return own(args), {name: own(x) for name, x in kwargs.items()}\n",
        "    return torch.utils._pytree.tree_map_only(Tensor, own, (args, kwargs))\n",
        ("wrap/test_arguments.py", "-k", "regional"),
    ),
    Mutation(
        "another compiler may drop a mark",
        "compile_passes/marks.py",
        "    torch.fx.node.has_side_effect(_mark)\n    torch.fx.node.has_side_effect(_mark.default)\n",
        "    pass\n",
        ("wrap/test_arguments.py", "-k", "another_compiler"),
    ),
    Mutation(
        "the mode on top is put aside, whosever it is",
        "intercept.py",
        "[mode for mode in before if mode is not self.mode]",
        "before[:-1]",
        ("wrap/test_taken_apart.py", "-k", "a_mode_around"),
    ),
    Mutation(
        "a block that was taken out stays as it is",
        "wrap.py",
        'modules += [(x.__dict__["_flexsparse_name"], x) for x in taken_out]',
        "taken_out.clear()",
        ("wrap/test_taken_apart.py", "-k", "taken_out"),
    ),
    Mutation(
        "a copy does not look whether a part of it is wrapped",
        "wrapped.py",
        "if inner.__dict__.get(STATE, state) is not state:",
        "if inner.__dict__.get(STATE) is None and inner is None:",
        ("wrap/test_taken_apart.py", "-k", "part_of_a_copy"),
    ),
    Mutation(
        "a hook of compiled autograd waits for a backward's end",
        "redone.py",
        "if is_compiling() or (task := torch._C._current_graph_task_id()) == -1:",
        "if (task := torch._C._current_graph_task_id()) == -1 and is_compiling():",
        ("wrap/test_taken_apart.py", "-k", "compiled_autograd", "-m", "slow or not slow"),
    ),
    Mutation(
        "a copy of a compiled attention module has the original's compiled form",
        "nn.py",
        "copy.deepcopy(self.__getstate__(), memo)",
        "copy.deepcopy(self.__dict__, memo)",
        ("test_nn.py", "-k", "copy_of_a_compiled"),
    ),
    Mutation(
        "a copy of a schedule has the original's tensor",
        "schedule.py",
        "        return copy.deepcopy(self)  #",
        "        return (new := object.__new__(SparsitySchedule)).__dict__.update(self.__dict__) or new  #",
        ("test_schedule.py", "-k", "moves_by_itself"),
    ),
)
