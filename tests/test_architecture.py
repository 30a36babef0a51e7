"""The import contract of the design, and other rules that a reader relies on."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "crosslm"
FILES = sorted(SOURCE.rglob("*.py"))

# who may import whom: a module may import from the layers above it in this list, and not from its own
LAYERS = [
    {
        "errors",
        "data.examples",
        "support.commands",
        "support.files",
        "support.memory",
        "support.plain",
        "support.seeding",
        "support.progress",
        "support.provenance",
        "support.quiet",
        "sections.section",
    },
    {"sections.privacy", "sections.task", "sections.models", "sections.federation"} | {"support.writing"},
    {"sections.method"},
    {"config"},
    {"config_file"},
    {"task", "records", "data.rows", "data.hub", "models.loading", "models.dtypes", "models.sealed"},
    {"algorithm.rewards", "algorithm.losses", "algorithm.selection", "algorithm.agreement"}
    | {"algorithm.membership", "algorithm.overlap", "algorithm.soft_labels", "algorithm.verbalizer"}
    | {"algorithm.per_label"},
    {"data.encodings"},
    {"data.texts", "data.demo", "models.sources", "models.encoder", "models.head", "models.tokens"},
    {"data.split", "models.vocabulary"},
    {"models.architecture"},
    {"models.decoding", "models.pooling", "models.batches", "privacy.leaks"},
    {"models.causal", "models.pretrained", "models.graph_decoding", "models.adapter_weights"},
    {"models.lower_layers"},
    {"models.llm", "models.slm", "privacy.canaries", "privacy.bounds", "privacy.private_noise"},
    {"privacy.private_mean", "privacy.accounting", "models.undo"},
    {"privacy.private_layers"},
    {"privacy.private_fit"},
    {"synthesis", "classification", "client", "llm_update", "teachers"},
    {"enhancement", "gate"},
    {"runs.synthetic_rows", "runs.folders"},
    {"server", "evaluate", "runs.rundir"},
    {
        "baselines",
        "runs.arrivals",
        "runs.measures",
        "runs.naming",
        "federation.exchange",
        "federation.messages",
        "federation.strict_json",
        "federation.silo_news",
        "runs.cards",
        "preflight.memory",
        "preflight.starter",
    },
    {"federation.tokenizer_rules", "federation.leaving", "federation.hashed_files", "federation.kit_toml"},
    {"federation.intake", "federation.arrivals_journal"},
    {"federation.local", "runs.checkpoint"},
    {"runs.preparation", "runs.snapshot", "runs.tracking"},
    {"runs.llm_cache", "preflight.machine"},
    {"runs.journal", "runs.loaded", "preflight.rows"},
    {"federation.keys", "federation.kits", "federation.kit_texts", "federation.spool", "federation.certificates"},
    {"federation.provision", "federation.silo_state"},
    {"federation.silo_models", "federation.renewal"},
    {"federation.silo"},
    {"federation.summary", "federation.opening"},
    {"federation.deployment"},
    {f"federation.flower.{name}" for name in ("payload", "bundle", "tasks", "proxies")},
    {"federation.flower.replies"},
    {f"federation.flower.{name}" for name in ("client_app", "carrier", "gateway")},
    {"federation.flower.exchange"},
    {"federation.flower.server_app", "federation.flower.processes", "federation.flower.answer"},
    {"federation.flower.server_processes", "federation.flower.questions"},
    {"federation.flower.silo_processes"},
    {"experiment", "preflight.doctor"},
    {"runs.finished", "federation.checkup"},
    {"runs.reevaluate", "runs.rollback", "runs.export", "runs.audit", "runs.baseline"},
    {"federation.self_audit"},
    {"reproduce.scale", "reproduce.bootstrap"},
    {"reproduce.benchmarks"},
    {"reproduce.plan"},
    {"reproduce.store", "reproduce.figures", "reproduce.inputs"},
    {"reproduce.notes", "reproduce.who_gains"},
    {"reproduce.tables", "reproduce.work"},
    {"reproduce.headline", "reproduce.markdown", "reproduce.plots", "reproduce.jobs"},
    {"reproduce.origins"},
    {"reproduce.report"},
    {"reproduce.driver"},
    {"runs.report", "cli.display", "html_report.intervals"},
    {"html_report.collect", "runs.watch"},
    {"html_report.findings", "html_report.plots", "html_report.verdict", "html_report.pooled"},
    {"html_report.page"},
    {"cli.app"},
    {"cli.stopping"},
    {f"cli.{name}" for name in ("audit", "baseline", "models", "reports", "reproduce", "runs", "start", "use")},
    {"cli.federation"},
    {"cli.recovery"},
    {"cli.main"},
    {"__main__"},
]


def module_name(path):
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def imports(path):
    """Every module that a file names in an import, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            package = SOURCE.parent.joinpath(*str(node.module).split(".")).is_dir()
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if package else [str(node.module)]


def layer_of(name):
    return next((number for number, layer in enumerate(LAYERS) if name in layer), None)


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=module_name)
def test_imports_point_downwards(path):
    here = layer_of(module_name(path))
    assert here is not None, f"{module_name(path)} has no place in LAYERS"
    for name in imports(path):
        if name.startswith("crosslm.") and name != "crosslm.__version__":
            there = layer_of(name.removeprefix("crosslm."))
            assert there is not None, name
            assert there < here, f"{module_name(path)} imports {name}, which is not below it"


def test_the_algorithm_is_pure():
    allowed = {"torch", "torch.nn.functional", "math", "statistics", "typing", "itertools", "collections.abc"}
    allowed |= {"unicodedata"}  # a table of characters: what is a letter, and in which forms one is written
    for path in (SOURCE / "algorithm").glob("*.py"):
        assert set(imports(path)) <= allowed, path


def test_configuration_and_task_need_no_torch():
    for name in (
        "config",
        *(f"sections.{path.stem}" for path in (SOURCE / "sections").glob("*.py")),
        "config_file",
        "task",
        "errors",
        "support.seeding",
        "support.progress",
    ):
        path = SOURCE / f"{name.replace('.', '/')}.py"
        assert not any(module.split(".")[0] in ("torch", "transformers") for module in imports(path))


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        (
            "flwr",
            {f"federation.flower.{name}" for name in ("server_app", "client_app", "carrier", "exchange", "payload")}
            | {f"federation.flower.{name}" for name in ("answer", "replies", "tasks")},
        ),
        ("datasets", {"data.hub", "runs.export"}),
        ("peft", {"models.causal", "models.llm", "models.adapter_weights"}),
        ("opacus", {"privacy.private_fit", "privacy.accounting"}),
        ("sentence_transformers", {"models.encoder"}),
        ("typer", {module_name(path) for path in FILES if module_name(path).startswith("cli.")}),
        (
            "subprocess",
            {"data.demo", "support.provenance"} | {f"federation.flower.{name}" for name in ("processes", "tasks")},
        ),
        ("mlflow", {"runs.tracking"}),
        ("wandb", {"runs.tracking"}),
        ("trackio", {"runs.tracking"}),
        ("matplotlib", {"html_report.plots", "reproduce.plots"}),
        ("jinja2", {"html_report.page"}),
        ("scipy", {"html_report.intervals", "privacy.accounting"}),
    ],
)
def test_a_library_is_used_in_its_place_only(library, allowed):
    users = {module_name(path) for path in FILES if any(name.split(".")[0] == library for name in imports(path))}
    assert users <= allowed


def test_nothing_trusts_what_it_loads():
    for path in FILES:
        text = path.read_text()
        for words in ("pickle", "torch.load(", "trust_remote_code=True", "shell=True", "eval("):
            found = [
                line for line in text.splitlines() if words in line and ".eval(" not in line and "No pickle" not in line
            ]
            assert not found, (path, found)


def test_files_are_written_by_their_writers_only():
    writers = {f"models.{name}" for name in ("sources", "vocabulary", "llm", "slm")}
    writers |= {f"federation.{name}" for name in ("provision", "flower.processes", "flower.server_processes")}
    writers |= {"support.files", "data.demo", "data.rows", "preflight.starter", "runs.rundir", "runs.export"}
    for path in FILES:
        if re.search(r"write_text\(|write_bytes\(|\.open\(\"[wa]|save_pretrained\(", path.read_text()):
            assert module_name(path) in writers, path


def test_no_place_of_one_machine_is_in_the_project():
    for path in [*FILES, *SOURCE.rglob("*.toml"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile"]:
        assert not re.search(r"(?<![\w.])/(home|Users|root|work|tmp|opt)/", path.read_text()), path


def test_the_library_does_not_print():
    for path in FILES:
        assert not re.search(r"(?<!\.)\bprint\(", path.read_text()), path
