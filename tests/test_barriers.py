"""Threads of a GPU program share memory only behind a barrier: checked on the source."""

import ast


def pointer_of(expression: ast.expr, values: dict[str, ast.expr]) -> str:
    "The leftmost name of a sum, traced back through local names."
    while isinstance(expression, ast.BinOp):
        expression = expression.left
    name = getattr(expression, "id", "")
    return pointer_of(values[name], values) if name in values else name


def local_values(function: ast.FunctionDef) -> dict[str, ast.expr]:
    "The first value of each local name; later ones, such as `x = after`, are no other memory."
    parameters, values = {argument.arg for argument in function.args.args}, {}
    for node in (node for node in ast.walk(function) if isinstance(node, ast.Assign)):
        target, value = node.targets[0], node.value
        pairs = zip(target.elts, value.elts) if isinstance(value, ast.Tuple) else [(target, value)]  # noqa: B905
        for name, given in pairs:
            if isinstance(name, ast.Name) and name.id not in parameters:
                values.setdefault(name.id, given)
    return values


Functions = dict[str, ast.FunctionDef]


def uses_between_barriers(name: str, functions: Functions) -> list[tuple[set[str], set[str]]]:
    "Pointers that a function loads from and stores to: before its first barrier, after it, and so on."
    body = functions[name].body
    barriers = [place for place, part in enumerate(body) if ast.unparse(part) == "tl.debug_barrier()"]
    edges = zip([-1, *barriers], [*barriers, len(body)], strict=True)
    values = local_values(functions[name])
    return [memory_uses(body[start + 1 : end], values, functions) for start, end in edges]


def memory_uses(
    statements: list[ast.stmt], values: dict[str, ast.expr], functions: Functions
) -> tuple[set[str], set[str]]:
    "Pointers that statements, and the functions that they call, load from and store to."
    loaded, stored = set(), set()
    for call in (node for part in statements for node in ast.walk(part) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if name in ("tl.load", "tl.store"):
            (loaded if name == "tl.load" else stored).add(pointer_of(call.args[0], values))
        elif name in functions:
            parameters = [argument.arg for argument in functions[name].args.args]
            given = dict(zip(parameters, call.args, strict=True))
            for theirs in uses_between_barriers(name, functions):
                for ours, pointers in zip((loaded, stored), theirs, strict=True):
                    ours |= {pointer_of(given[pointer], values) for pointer in pointers}
    return loaded, stored


def unsafe_pointers(source: str) -> set[tuple[str, str]]:
    "Function and pointer wherever memory is read that was written with no barrier in between."
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
                 and "triton.jit" in map(ast.unparse, node.decorator_list)}
    return {(name, pointer) for name in functions for loaded, stored in uses_between_barriers(name, functions)
            for pointer in loaded & stored}


def test_no_thread_reads_what_another_wrote_without_a_barrier(root):
    source = (root / "thesis_ltc" / "ltc" / "gpu.py").read_text()
    assert source.count("@triton.jit") > 15 and source.count("tl.debug_barrier()") == 2
    assert unsafe_pointers(source) == set()


def test_a_missing_barrier_is_noticed(root):
    source = (root / "thesis_ltc" / "ltc" / "gpu.py").read_text()
    without = source.replace("    tl.debug_barrier()\n", "")
    assert unsafe_pointers(without) == {("read_kernel", "sums"), ("reverse_kernel", "sums")}
    store = "tl.store(part + j, tl.sum(gate, 1))"
    assert source.count(store) == 1
    added = source.replace(store, "tl.store(part + j, tl.load(part + j) + tl.sum(gate, 1))")
    assert ("read_sensory", "sums") in unsafe_pointers(added)
    store = "tl.store(place + neurons, sum_leak"
    kept = source.replace(store, f"tl.load(place)\n    {store}")
    assert ("store_membranes", "gradients") in unsafe_pointers(kept)
