"""Every message that a user can meet: what it is about, where, and what to do; and what a terminal shows."""

import ast
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import TINY_AMOUNTS
from rich.console import Console

from crosslm import errors
from crosslm.cli import main as cli
from crosslm.cli.main import SPINS
from crosslm.cli.runs import _somebody_reads
from crosslm.cli.stopping import StopRequest
from crosslm.config_file import load
from crosslm.errors import (
    BrokenLLMError,
    CollapseError,
    ConfigError,
    CrosslmError,
    DataError,
    DeclinedError,
    FederationError,
    KeptFileError,
    LeakError,
    ModelError,
    PassingError,
    QuarantineError,
    RunError,
    ShortageError,
    StoppedError,
    UnservedError,
    UploadError,
)
from crosslm.federation.provision import provision

SOURCE = Path(__file__).parents[1] / "src" / "crosslm"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
CLASSES = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, CrosslmError)}
STRICT_GATE = (
    "--set",
    "gate.enabled=true",
    "--set",
    "gate.teach_refused=false",
    "--set",
    "gate.min_texts=1",
    "--set",
    "gate.margin=0.49",
    "--set",
    "gate.confidence=0.51",
)
ONE_TOKEN = ("--set", "synthesis.max_new_tokens=1", "--set", "synthesis.max_attempts=2")
LEAK_BOUND = ("--set", "gate.enabled=false", "--set", "privacy.max_similarity=-0.99")
OVERRIDES = [part for amount in TINY_AMOUNTS for part in ("--set", amount)]


@pytest.fixture
def caught(monkeypatch):
    """What :func:`crosslm.cli.main.main` catches."""
    found, app = [], cli.app

    def recorded():
        try:
            app()
        except CrosslmError as error:
            found.append(error)
            raise

    monkeypatch.setattr(cli, "app", recorded)
    return found


def weights_not_finite(monkeypatch):
    from crosslm import experiment

    train = experiment.Client.train

    def damaged(client):
        upload = train(client)
        for weight in upload.slm.weights.values():
            if weight.is_floating_point():
                weight.fill_(float("nan"))
        return upload

    monkeypatch.setattr(experiment.Client, "train", damaged)


def llm_breaks_in_each_arrival(monkeypatch):
    from crosslm import server

    synthesize = server.synthesize

    def breaks(llm, *arguments):
        if llm.fingerprint() != untrained.setdefault("llm", llm.fingerprint()):
            raise CollapseError("it writes nothing")
        return synthesize(llm, *arguments)

    untrained = {}
    monkeypatch.setattr(server, "synthesize", breaks)


def ctrl_c_while_a_client_trains(monkeypatch):
    from crosslm import experiment

    train = experiment.Client.train

    def pressed(client):
        signal.raise_signal(signal.SIGINT)
        return train(client)

    monkeypatch.setattr(experiment.Client, "train", pressed)


def flwr_fails(monkeypatch):
    from crosslm.federation.flower import processes, server_processes

    provision(load("tickets.toml"), "localhost:1", Path("kits"))
    monkeypatch.setattr(processes, "program", lambda name: "false")
    monkeypatch.setattr(processes, "RESTART", 0.0)
    monkeypatch.setattr(server_processes.ServerProcesses, "run", lambda server: processes.flwr(server.kit, "run"))


def no_memory_for_a_check(monkeypatch):
    from crosslm.federation import intake

    def decoded(data):
        raise MemoryError

    monkeypatch.setattr(intake, "decode_upload", decoded)


def a_kept_upload_has_changed(monkeypatch):
    provision(load("tickets.toml"), "localhost:1", Path("kits"))
    state = Path("kits/silos/north/state")
    state.mkdir()
    (state / "upload-0000.safetensors").write_bytes(b"cut off")
    (state / "upload-0000.safetensors.sha256").write_text("0" * 64)


# for each class: what is typed in a folder with tickets.toml, what is done to the program, what is said
CASES = {
    ConfigError: (
        ("run", "tickets.toml", "--set", "llm.sampels=3"),
        None,
        r"--set llm.sampels=3: unknown key .*did you mean",
    ),
    DataError: (("run", "tickets.toml", "--set", "data.test=none.csv"), None, r"none.csv: no such file; set data.dir"),
    ModelError: (("run", "tickets.toml", "--set", "llm.model=./none"), None, r"llm.model = './none': .*give a folder"),
    KeptFileError: (
        ("predict", "kits/silos/north", "test.csv"),
        a_kept_upload_has_changed,
        r"upload-0000.safetensors has changed since it was written; put upload-0000.safetensors",
    ),
    CollapseError: (
        ("run", "tickets.toml", "--output", "run", *OVERRIDES, *ONE_TOKEN),
        None,
        r"texts could not be written in 2 attempts .*look at task.prompt and synthesis.stop",
    ),
    RunError: (("evaluate", "nowhere"), None, r"nowhere: is not there; give a run folder that crosslm run"),
    # a client's upload does not end a run of others; the run ends when nobody is left, and says what each said
    UploadError: (
        ("run", "tickets.toml", "--output", "run", *OVERRIDES),
        weights_not_finite,
        r"run: no client could be served; when this is mended, run again:"
        r".*UploadError: client north: its weight \S+ is not finite; lower",
    ),
    BrokenLLMError: (
        ("run", "tickets.toml", "--output", "run", *OVERRIDES),
        llm_breaks_in_each_arrival,
        r"no client could be served.*BrokenLLMError: client north: with its rewards the LLM broke.*look at that client",
    ),
    QuarantineError: (
        ("run", "tickets.toml", "--output", "run", *OVERRIDES, *STRICT_GATE),
        None,
        r"client north: quarantined: its AUC is .*; look at that client's data"
        r".*error: run: no client could be served.*client north: .*quarantined: its AUC",
    ),
    UnservedError: (
        ("run", "tickets.toml", "--output", "run", *OVERRIDES, *STRICT_GATE),
        None,
        r"error: run: no client could be served; when this is mended, run again",
    ),
    LeakError: (
        ("run", "tickets.toml", "--output", "run", *OVERRIDES, *LEAK_BOUND),
        None,
        r"client north failed: .*\(privacy.max_similarity\); the SLM is not taken back; look at",
    ),
    ShortageError: (
        ("run", "tickets.toml", "--output", "run", *OVERRIDES),
        no_memory_for_a_check,
        r"client north: a check could not be made: MemoryError: ; see to it that this machine has room",
    ),
    FederationError: (("server", "nowhere"), None, r"nowhere: is not there; name a folder that crosslm provision made"),
    PassingError: (("server", "kits/server"), flwr_fails, r"flwr run failed 3 times, start it again"),
    StoppedError: (
        ("run", "tickets.toml", "--output", "run", *OVERRIDES),
        ctrl_c_while_a_client_trains,
        r"stopped after arrival 1; .*To go on: crosslm run run/config.toml --output run --resume",
    ),
}
ENDS = {
    UploadError: (2, [UnservedError]),
    BrokenLLMError: (2, [UnservedError]),
    QuarantineError: (2, [UnservedError]),
    LeakError: (0, []),
    StoppedError: (130, None),
    PassingError: (75, None),
    ShortageError: (2, [UnservedError]),
}
"""Exit code, and the class that the command line catches, where they are not 2 and the class itself.

Five of them end one client's arrival and not the run, which says so while it goes on. It fails if it has served
nobody; a client that was served and has not taken its SLM back does not make it fail.
"""


def test_every_class_has_a_case():
    in_a_silos_log = DeclinedError  # tests/test_federation.py
    assert set(CASES) == CLASSES - {CrosslmError, in_a_silos_log}


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_every_class_reaches_the_user_as_words_and_a_code(kind, shell, caught, workplace, tmp_path, monkeypatch):
    for path in workplace.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    arguments, prepare, message = CASES[kind]
    (tmp_path / "tickets.toml").write_text((tmp_path / "tickets.toml").read_text().replace(str(workplace), "."))
    if prepare:
        prepare(monkeypatch)
    before = signal.getsignal(signal.SIGINT)
    code, out, err = shell(*arguments)
    assert signal.getsignal(signal.SIGINT) == before  # whoever heard Ctrl-C before hears it again
    expected, classes = ENDS.get(kind, (2, None))
    assert code == expected, err
    assert err.startswith("error: ") == (code in (2, 75))
    assert "Traceback" not in err
    assert re.search(message, out + err, re.S), out + err
    assert [type(error) for error in caught] == ([kind] if classes is None else classes)


def test_ctrl_c_is_heard_within_a_stop_request_and_does_afterwards_what_it_did_before():
    heard = []
    former = signal.signal(signal.SIGINT, lambda *_: heard.append("before"))
    try:
        with StopRequest() as stop:
            assert not stop()
            signal.raise_signal(signal.SIGINT)
            assert stop()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert heard == ["before"]
    finally:
        signal.signal(signal.SIGINT, former)


def raise_sites():
    """File, line and message of each ``raise`` of one of our classes."""
    names = {kind.__name__ for kind in CLASSES}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names:
                if path.relative_to(SOURCE).as_posix() in PARTS or words_of(call.args[0]) in PARTS_OF_ALL:
                    continue
                yield pytest.param(call.args[0], id=f"{path.relative_to(SOURCE)}:{node.lineno}")


def words_of(message):
    """The literal words of a message, each value in it as {}."""
    if isinstance(message, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in message.values)
    return message.value if isinstance(message, ast.Constant) else None


PARTS = {"federation/intake.py", "federation/strict_json.py", "federation/tokenizer_rules.py", "models/architecture.py"}
"""What these files say of a stranger's bytes is part of one sentence, and its beginning names the client (or the
silo, or the model folder). It says what was found. Nobody is to mend such bytes but who made them by hand: what an
honest client sends passes."""
PARTS_OF_ALL = {"the SLM cannot classify: {}: {}", "the SLM gives probabilities that are not finite"}
"""Who catches these puts the client's name before them, since they are found in a stranger's classifier, too."""

NEXT = re.compile(
    r"must|needs?\b|give|set |choose|name |name\b.*new|\bput\b|lower|raise|look at|run[: ]|install|delete|unpack|start|"
    r"known|allowed|are[: ]|add |say|mend|make |write|keep|use |go on|did you|\?|\n",
)


@pytest.mark.parametrize("message", list(raise_sites()))
def test_a_message_names_what_it_is_about_and_what_to_do(message):
    words = words_of(message)
    if words is None:
        return  # put together elsewhere, from parts that are tested there
    assert "{}" in words or re.search(r"\w+\.\w+|--\w+|text|input", words), (
        f"names no file, key, client or value: {words!r}"
    )
    assert NEXT.search(words), f"says neither what is allowed nor what to do: {words!r}"
    assert not words.rstrip().endswith("!"), words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("doctor", "kits/nroth"), "kits/nroth: is not there; did you mean kits/north?"),
        (("status", "kits/nroth"), "kits/nroth: is not there; did you mean kits/north?"),
        (("client", "kits/nroth"), "kits/nroth: is not there; did you mean kits/north?"),
        (("run", "tikets.toml"), "tikets.toml: is not there; did you mean tickets.toml?"),
        (("run", "mine"), "mine: is a folder; name the configuration in it: mine/mine.toml"),
        (("run", "kits"), "kits: is a folder without a configuration (it has no .toml file); name a configuration"),
        *(
            ((command, "kits"), "kits: has the kits of a federation in it; give one of them: kits/server, kits/silos/a")
            for command in ("doctor", "status", "watch", "report", "client", "server")
        ),
        *(
            ((command, "seeds"), "seeds: has runs of several seeds; give one of them: seeds/seed-0, seeds/seed-1")
            for command in ("status", "watch", "evaluate", "predict", "report")
        ),
        (("doctor", "seeds"), "seeds: is a folder without a configuration"),
    ],
)
def test_a_path_that_is_mistyped_is_told_with_what_stands_beside_it(shell, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    seeds = [f"seeds/seed-{seed}" for seed in (1, 0)]
    for folder in ("kits/north", "kits/server", "kits/silos/a", "kits/silos/of another", "mine", *seeds):
        (tmp_path / folder).mkdir(parents=True)
    made = ("kits/server/server.toml", "kits/silos/a/silo.toml", *(f"{folder}/config.toml" for folder in seeds))
    for file in ("tickets.toml", "mine/mine.toml", *made):
        (tmp_path / file).write_text("")
    code, out, err = shell(*arguments)
    assert code == 2
    assert message in (out + err).replace("\n", " ")


# -- what a terminal shows -----------------------------------------------------------------------


ESCAPE = "\x1b"


def test_tables_fit_80_columns_and_have_no_colour_in_a_pipe(shell, workplace):
    code, out, err = shell("report", workplace / "runs" / "tickets-1")
    assert (code, err) == (0, "")
    assert ESCAPE not in out
    lines = [line for line in out.splitlines() if not line.startswith("Report: ")]  # a path is not cut
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", ["--help", "run", "demo", "init", "doctor", "predict", "generate", "export"])
def test_help_fits_80_columns(shell, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = shell(*((command,) if command == "--help" else (command, "--help")))
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert ESCAPE not in out


def test_the_demo_says_what_is_wrong_before_it_fetches_anything(shell, tmp_path, monkeypatch):
    monkeypatch.setattr("crosslm.data.demo.prepare_data", lambda *_: pytest.fail("fetched"))
    code, _, err = shell("demo", "--set", "llm.sampels=3")
    assert (code, "did you mean 'samples'?" in err) == (2, True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    code, _, err = shell("demo", "--output", tmp_path / "full")
    assert (code, "holds other files already" in err) == (2, True)


@pytest.mark.parametrize("command", sorted(typer.main.get_command(cli.app).commands))
def test_help_has_no_marks_that_were_meant_for_rich(shell, command):
    code, out, _ = shell(command, "--help")
    assert code == 0
    assert "\\[" not in out
    if command == "run":
        assert "yahoo_answers.  [required]" in " ".join(out.split("\n"))


@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_no_colour_gets_none(variable, workplace, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["crosslm", "doctor"])
    seen = io.StringIO()
    monkeypatch.setattr("crosslm.cli.start.console", Console(file=seen, force_terminal=True, width=80))
    with pytest.raises(SystemExit):
        cli.main()
    assert "python: " in seen.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", seen.getvalue())  # no colour of any text
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in seen.getvalue().splitlines()) <= 80


def test_a_terminal_without_unicode_still_gets_the_tables(workplace, monkeypatch):
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.argv", ["crosslm", "report", str(workplace / "runs" / "tickets-1")])
    monkeypatch.setattr(sys, "stdout", plain)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    plain.flush()
    assert "Standalone" in plain.buffer.getvalue().decode("ascii")


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ({}, SPINS),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_threads_wait_briefly_unless_somebody_has_chosen(chosen, found, monkeypatch):
    """Where another process wants a core, threads that turn while they wait make a command several times slower."""
    monkeypatch.setattr(os, "environ", {**chosen})
    seen = []
    monkeypatch.setattr(cli, "app", lambda: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    cli.main()
    assert seen == [found]


def test_a_reader_that_goes_away_is_no_error(workplace, shell, monkeypatch):
    """As in ``crosslm predict ... | head -1``."""

    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("crosslm.data.rows.sys.stdout", Closed())
    code, _, err = shell("predict", workplace / "runs" / "tickets-1", "--client", "north", stdin="x\n" * 200)
    assert (code, err) == (1, "")


def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    code = "import sys; sys.argv = ['crosslm', '--version']; from crosslm.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert done.stderr == b""


def test_a_run_whose_output_is_closed_says_so_and_how_to_go_on(workplace, tmp_path):
    """As in ``crosslm run ... | head``."""
    folder = tmp_path / "run"
    call = [sys.executable, "-m", "crosslm", "run", "tickets.toml", "--output", str(folder), "--cache-dir", "cache"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(call, cwd=workplace, env=ENVIRONMENT, **pipes) as run:
        while (line := run.stdout.readline()) and not (folder / "config.toml").exists():
            pass
        assert line
        run.stdout.close()
        err = run.stderr.read()
    assert run.returncode == 130, err
    resuming = f"crosslm run {folder / 'config.toml'} --output {folder} --resume"
    said = f"What earlier arrivals did is in {folder}. To go on: {resuming}\n"
    assert err == f"stopped, since its output was closed; give it one that stays open. {said}"


def test_where_nobody_reads_any_more_it_is_said_what_there_is(tmp_path):
    for name, said in ((".lock", "had been done"), ("config.toml", "To go on: "), ("summary.json", "is complete")):
        (tmp_path / name).write_text("")
        with pytest.raises(StoppedError, match=f"its output was closed; .*{said}"), _somebody_reads(tmp_path):
            raise SystemExit(1)


def test_help_comes_without_torch():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv = ['crosslm', '--help']\nfrom crosslm.cli.main import main\n"
            "try: main()\nexcept SystemExit: pass\n"
            "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules], file=sys.stderr)",
        ],
        env=ENVIRONMENT,
        capture_output=True,
        check=True,
    )
    assert done.stderr.strip() == b"[]"
    assert b"predict" in done.stdout


def test_what_typer_refuses_ends_with_code_2_too(shell):
    code, _, err = shell("predict")
    assert code == 2
    assert "Missing argument 'RUN'" in err


def test_the_nearest_command_is_named_once(shell):
    code, _, err = shell("rnu")
    assert code == 2
    assert err.count("Did you mean") == 1


def test_who_runs_the_demo_by_its_configuration_is_told_the_command_that_has_its_data(shell, workplace, tmp_path):
    said = "crosslm demo fetches those of demo"
    code, _, err = shell("run", "demo")
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(rf"test.csv: no such file; set data.dir or --data-dir .*{said}", err), err
    for arguments in (("demo", "--data-dir", tmp_path), (workplace / "tickets.toml", "--set", "data.test=none.csv")):
        assert said not in shell("run", *arguments)[2]


def test_a_file_that_is_not_there_is_said_in_so_many_words(shell, workplace):
    for arguments in (
        ("predict", workplace / "runs" / "tickets-1", "none.csv", "--client", "north"),
        ("prepare-model", "x", "--trim-vocabulary", "none.csv", "--output", "y"),
    ):
        code, _, err = shell(*arguments)
        assert (code, err) == (2, "error: none.csv: no such file; name one that is there\n")


def test_it_is_a_module_too():
    done = subprocess.run(
        [sys.executable, "-m", "crosslm", "--version"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\d+\.\d+\S*\n", done.stdout)


def test_a_disk_that_is_full_names_the_file(shell, workplace, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device", "out.jsonl")

    monkeypatch.setattr("crosslm.cli.use.write_rows", full)
    code, _, err = shell("predict", workplace / "runs" / "tickets-1", "--client", "north", stdin="x\n")
    assert code == 2
    assert "No space left on device: 'out.jsonl'" in err


@pytest.mark.parametrize("engine", [{}, {"engine": "flower"}])
@pytest.mark.parametrize("figures", [{"steps": []}, {"slm": {}}, {"slm": {"crosslm": {"mean": 1.0}}}, {"slm": [1]}])
def test_a_summary_without_its_figures_is_refused_in_words(shell, tmp_path, engine, figures):
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "summary.json").write_text(json.dumps(figures | engine))
    for command in (("report",), ("predict", "--client", "north"), ("evaluate",), ("watch",), ("audit",)):
        code, _, err = shell(*command, tmp_path, stdin="x\n")
        assert code == 2, command
        assert f"{tmp_path / 'summary.json'}: has no figures of classifiers" in err


def test_a_summary_without_what_is_shown_and_a_configuration_of_no_run_are_refused_in_words(shell, workplace, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workplace / "runs" / "tickets-1", run)
    whole = (run / "summary.json").read_text()
    for text, lacks in (
        ("[]", "figures (it must be an object)"),
        (json.dumps({name: value for name, value in json.loads(whole).items() if name != "clients"}), "clients"),
        (json.dumps({name: value for name, value in json.loads(whole).items() if name != "seconds"}), "seconds"),
    ):
        (run / "summary.json").write_text(text)
        code, _, err = shell("report", run)
        assert code == 2
        assert f"{run / 'summary.json'}: has no {lacks}: damaged, or of an earlier version" in err
    (run / "summary.json").write_text(whole)
    for text in ('name = "x"\n', 'task = "x"\n', "[task]\n"):
        (run / "config.toml").write_text(text)
        code, _, err = shell("report", run)
        assert code == 2
        assert f"{run / 'config.toml'}: damaged, or not of a run (it has no task.labels)" in err
