"""Laws of the public names, and of what may import what."""

import ast
import dataclasses
import graphlib
import inspect
from pathlib import Path

import jax
import pytest

import bilevax as bx

SOURCE = Path(bx.__file__).parent
MODULES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
PUBLIC = {
    name: value
    for name, value in vars(bx).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}
CLASSES = [value for value in PUBLIC.values() if inspect.isclass(value)]
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]
COMPONENTS = (
    bx.Solver,
    bx.LinearSolver,
    bx.Rule,
    bx.IterativeRule,
    bx.Step,
    bx.Change,
    bx.Problem,
    bx.StochasticProblem,
    bx.Sampler,
    bx.Schedule,
)
# What functions hand out, and what solvers hand to the loop: nobody makes these.
HANDED_OUT = {
    "Best",
    "BilevelHistory",
    "BilevelState",
    "Certificate",
    "DescentHistory",
    "DescentResult",
    "EfficiencyConstant",
    "Engine",
    "Hypergradient",
    "HypergradientBound",
    "HypergradientReport",
    "Iterate",
    "LinearOperator",
    "LinearReport",
    "MaidStep",
    "Milestone",
    "MinimizeResult",
    "OuterStep",
    "RuleReport",
    "RuleTable",
    "SamplerState",
    "ScipyObjective",
    "Seconds",
    "Separable",
    "SolutionMap",
    "SolveError",
    "SolveReport",
    "StochasticEngine",
    "StochasticHypergradient",
    "StochasticProblem",
    "StochasticReport",
    "StochasticState",
    "WarmStart",
}


# Documentation.


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring_of_its_own(name):
    text = vars(PUBLIC[name]).get("__doc__") if inspect.isclass(PUBLIC[name]) else None
    text = PUBLIC[name].__doc__ if text is None else text
    assert text and len(text.splitlines()[0].strip()) > 10
    # Data classes and named tuples write a signature where there is no docstring.
    assert not text.startswith(f"{name}(")


@pytest.mark.parametrize(
    "name",
    [name for name in PUBLIC if name not in HANDED_OUT and not inspect.isabstract(PUBLIC[name])],
)
def test_everything_that_users_make_or_call_has_an_example(name):
    assert ">>> " in inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_take_and_return(name):
    text = inspect.getdoc(PUBLIC[name])
    assert "\nArgs:\n" in text and "\nReturns:\n" in text
    for parameter in inspect.signature(PUBLIC[name]).parameters:
        assert f"\n  {parameter}: " in text
    if name != "linear_solve":  # which checks nothing itself
        assert "\nRaises:\n" in text


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_classes_describe_every_field(cls):
    text = inspect.getdoc(cls)
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls) if field.init]
    else:
        names = getattr(cls, "_fields", ())
    if cls.__name__ in ("Engine", "SolutionMap"):  # made and called; their fields are private
        return
    for name in names:
        assert f"\n  {name}: " in text, name


def test_public_methods_have_docstrings():
    for cls in (*COMPONENTS, bx.SolutionMap, bx.Engine):
        for name, method in vars(cls).items():
            if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_")):
                assert method.__doc__, f"{cls.__name__}.{name}"


# Classes.


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_class_is_abstract_or_final(cls):
    subclasses = [sub for sub in cls.__subclasses__() if sub.__module__.startswith("bilevax")]
    assert inspect.isabstract(cls) or not subclasses


def concrete_components():
    def descendants(cls):
        for sub in cls.__subclasses__():
            yield from (sub, *descendants(sub))

    found = [cls for base in COMPONENTS for cls in descendants(base)]
    return [c for c in found if c.__module__.startswith("bilevax") and not inspect.isabstract(c)]


@pytest.mark.parametrize("cls", concrete_components(), ids=lambda cls: cls.__name__)
def test_components_are_frozen_data_classes_and_pytrees(cls):
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    node = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(node, field.name, None)
    # Not a leaf: a class that is not registered would come back as it is.
    assert not jax.tree_util.all_leaves([node])


def test_components_of_different_classes_have_different_structures():
    # Structures are keys of what was compiled.
    def function(x, y):
        return 0.5 * x + y

    assert jax.tree.structure(bx.root(function)) != jax.tree.structure(bx.fixed_point(function))
    solvers = [bx.ConjugateGradient(), bx.GradientDescent(0.1), bx.AcceleratedGradient(0.1)]
    assert len({jax.tree.structure(solver) for solver in solvers}) == 3
    linear_solvers = [bx.CG(), bx.NormalCG(), bx.BiCGStab()]
    assert len({jax.tree.structure(solver) for solver in linear_solvers}) == 3


# Imports.

# A module imports only what stands in an earlier row.
LAYERS = [
    {"_mesh"},
    {"_trees", "_status", "_checks"},
    {"_results", "_operator", "_failure", "_closures"},
    {"_problems"},
    {"_separable"},
    {"_scaling"},
    {"linear"},
    {"solvers"},
    {"_loop"},
    {"_unroll"},
    {"rules", "_iterative"},
    {"_estimator"},
    {"certificates"},
    {"stochastic"},
    {"_solution_map", "hypergradient"},
    {"outer"},
    {"diagnostics", "checkpoints"},
    {""},  # the package itself, which exports
    {"_frontend"},
    {"cli", "demo"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# What a layer knows nothing of, although it stands earlier.
APART = [("linear", "_problems"), ("solvers", "_loop"), ("rules", "_loop"), ("rules", "solvers")]


def layer(module):
    return [*module.split("."), ""][1]


def imports(module):
    """Return the modules of this package that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name in MODULES}
            found |= modules
            if modules != names:  # something inside of the module itself
                found.add(node.module)
    return {name for name in found if name in MODULES}


def test_the_graph_of_imports_has_no_cycle():
    graph = {module: imports(module) for module in MODULES}
    assert "bilevax.linear" in graph["bilevax._loop"]  # the graph is not empty
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("bilevax._problems") < order.index("bilevax._solution_map")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_earlier_layers(module):
    assert layer(module) in RANK, "a new module needs a place in the order of layers"
    for imported in imports(module):
        if layer(imported) != layer(module):
            assert RANK[layer(imported)] < RANK[layer(module)], imported
            assert (layer(module), layer(imported)) not in APART, imported


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_inside_a_function(module):
    # A command is imported when it is run, for --help waits for no pandas, and an optional package
    # by the adapter that needs it.
    if module in ("bilevax.cli.app", "bilevax.linear._lineax"):
        return
    for function in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            delayed = [n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not delayed, function.name


def test_custom_derivatives_have_five_homes():
    # Those of x*, of a linear solve, of a line search, whose outcome is a constant, of what failed
    # and has none, and of what a run knows already where its last steps begin.
    def defines(path):
        nodes = ast.walk(ast.parse(path.read_text()))
        return {node.attr for node in nodes if isinstance(node, ast.Attribute)} & {
            "custom_vjp",
            "custom_jvp",
        }

    homes = {module for module, path in MODULES.items() if defines(path)}
    assert homes == {
        "bilevax._failure",
        "bilevax._solution_map",
        "bilevax._unroll",
        "bilevax.linear._solve",
        "bilevax.solvers._line_search",
    }


def test_the_package_exports_what_it_imports_and_nothing_private():
    for node in ast.parse((SOURCE / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name and not alias.name.startswith("_")
                assert alias.name in PUBLIC
    for value in PUBLIC.values():
        assert value.__module__.startswith("bilevax.")
