"""``crosslm doctor KIT``: certificates, keys, ports, data and models of a server and of a silo."""

import re
import socket
import ssl
import sys
import threading
import tomllib

import pytest
import tomli_w

import crosslm
from crosslm.config import AcceptanceConfig, Config, FitConfig, IntakeConfig, PrivacyConfig, SLMSpec
from crosslm.errors import CrosslmError
from crosslm.federation import certificates, checkup
from crosslm.federation.kits import SERVER_FILE, SILO_FILE, dump, held, read_server, read_silo, server_config
from crosslm.federation.provision import provision
from crosslm.preflight import machine
from crosslm.runs.preparation import measured_on, original_llm, public_texts


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def made(tables, folder, address=None):
    """Kits whose ports are free."""
    provision(Config.model_validate(tables), address or f"localhost:{free_port()}", folder)
    change(folder / "server", superlink_port=free_port())
    for silo in (folder / "silos").iterdir():
        change(silo, runtime_port=free_port())
    return folder


def change(kit, **fields):
    name, read = (SERVER_FILE, read_server) if (kit / SERVER_FILE).exists() else (SILO_FILE, read_silo)
    (kit / name).write_text(dump(read(kit).model_copy(update=fields)))


@pytest.fixture
def kits(federated, tmp_path, data_folder):
    folder = made(federated, tmp_path / "kits")
    (folder / "silos" / "silo-0" / "silo-0.csv").write_bytes((data_folder / "silo-0.csv").read_bytes())
    return folder


@pytest.fixture
def serving():
    """Answer in TLS with a kit's certificate, as ``crosslm server`` does, until the test is over."""
    opened = []

    def serve(kit, port):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(kit / "server.crt", kit / "server.key")
        listener = socket.create_server(("127.0.0.1", port))
        opened.append(listener)

        def answer():
            while True:
                try:
                    context.wrap_socket(listener.accept()[0], server_side=True).close()
                except ssl.SSLError:
                    continue  # whom the certificate does not please hangs up
                except OSError:
                    return

        threading.Thread(target=answer, daemon=True).start()

    yield serve
    for listener in opened:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def deeper(kit):
    return read_silo(kit).slm.model_copy(update={"num_hidden_layers": 9})


def port_of(kits):
    return int(read_server(kits / "server").address.rpartition(":")[2])


def lines(out, level):
    return [line for line in out.splitlines() if line.startswith(level)]


def test_a_good_server_kit(kits, shell):
    code, out, err = shell("doctor", kits / "server")
    assert (code, err) == (0, "")
    assert lines(out, "error") == []
    (warning,) = lines(out, "warning")
    assert "test.csv is not there: no accuracy will be known here" in warning
    for words in (
        "ok      ca.crt: valid until ",
        "ok      server.crt: valid until ",
        "silo-0, silo-1 are known by",
        "ok      memory: some ",
        f"0.0.0.0:{port_of(kits)} is free",
        "told apart by their first tokens",
    ):
        assert words in out, words


def test_a_good_silo_kit_before_and_while_the_server_runs(kits, shell, serving):
    kit = kits / "silos" / "silo-0"
    code, out, err = shell("doctor", kit)
    assert (code, err) == (0, "")
    assert "ok      privacy.epsilon: none, so that what the weights tell of single rows has no bound" in out
    assert "ok      data.test: none named: what this silo gains will be known of the few rows alone" in out
    few, server = sorted(lines(out, "warning"))
    assert f"server: localhost:{port_of(kits)} does not answer" in server
    assert "data: silo-0.csv: 15 rows" in few
    serving(kits / "server", port_of(kits))
    code, out, _ = shell("doctor", kit)
    assert (code, lines(out, "warning")) == (0, [few])
    assert "answers with a certificate of this federation" in out


def test_a_silo_sees_that_another_federation_answers(kits, federated, shell, serving, tmp_path):
    other = made(federated, tmp_path / "other", f"localhost:{port_of(kits)}")
    serving(other / "server", port_of(kits))
    code, out, _ = shell("doctor", kits / "silos" / "silo-0")
    assert code == 2
    assert "was not signed by the authority in" in "\n".join(lines(out, "error"))


def test_a_server_may_have_another_port_with_the_same_certificate(kits, shell, serving):
    """As docs/deploy.md says: it is for a name alone."""
    port = free_port()
    change(kits / "server", address=f"localhost:{port}")
    change(kits / "silos" / "silo-0", server=f"localhost:{port}")
    serving(kits / "server", port)
    assert "answers with a certificate of this federation" in shell("doctor", kits / "silos" / "silo-0")[1]
    code, out, _ = shell("doctor", kits / "server")
    assert (code, "error   server.crt" in out) == (0, False)


def test_a_port_that_is_taken_and_one_that_the_server_itself_has(kits, shell, serving):
    with socket.create_server(("127.0.0.1", read_server(kits / "server").superlink_port)):
        code, out, _ = shell("doctor", kits / "server")
    assert code == 2
    assert "is in use by another program; end it, or choose another superlink_port in server.toml" in out
    silo = kits / "silos" / "silo-0"
    with socket.create_server(("127.0.0.1", read_silo(silo).runtime_port)):
        other = shell("doctor", silo)[1]
        with held(silo):
            own = shell("doctor", silo)[1]
    assert "is in use by another program; end it, or choose another runtime_port in silo.toml" in other
    assert f"127.0.0.1:{read_silo(silo).runtime_port} is in use, and this kit is at work" in own
    serving(kits / "server", port_of(kits))
    code, out, _ = shell("doctor", kits / "server")
    assert code == 0
    assert f"0.0.0.0:{port_of(kits)} is in use by a server of this federation, which runs already" in out


@pytest.mark.parametrize(
    ("days", "code", "message"),
    [(0, 2, "error   server.crt: has expired on "), (10, 0, "warning server.crt: expires in 9 days, on ")],
)
def test_certificates_that_end(federated, shell, tmp_path, monkeypatch, days, code, message):
    monkeypatch.setattr(certificates, "VALID_DAYS", days)
    monkeypatch.setattr(certificates, "AUTHORITY_DAYS", days)
    kits = made(federated, tmp_path / "kits")
    found, out, _ = shell("doctor", kits / "server")
    assert found == code
    assert message in out
    assert message.replace("server.crt", "ca.crt") in out
    again = "where the kits were made, give crosslm provision FEDERATION.toml --output KITS --renew"
    assert sum(again in line for line in out.splitlines()) == 2
    out = shell("doctor", kits / "silos" / "silo-0")[1]
    assert sum("ca.crt: " in line and again in line for line in out.splitlines()) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["server.key"], "server.crt: does not belong to server.key"),
        (["ca.crt"], "server.crt: was not signed by the authority in ca.crt"),
    ],
)
def test_files_of_two_federations_do_not_fit(kits, federated, shell, tmp_path, names, message):
    other = made(federated, tmp_path / "other")
    for name in names:
        (kits / "server" / name).write_bytes((other / "server" / name).read_bytes())
    code, out, _ = shell("doctor", kits / "server")
    assert code == 2
    assert message in out


def test_a_certificate_for_another_name_and_no_silo(kits, shell):
    change(kits / "server", address=f"server.example.org:{port_of(kits)}")
    for path in (kits / "server" / "silos").iterdir():
        path.unlink()
    code, out, _ = shell("doctor", kits / "server")
    assert code == 2
    assert "is for 127.0.0.1, localhost, and silos connect to server.example.org: they refuse it; where the" in out
    assert "give crosslm provision FEDERATION.toml --output KITS --renew --address server.example.org:" in out
    assert "has no public key of a silo" in out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda kit: (kit / "silo.key").unlink(), "error   silo.key: "),
        (lambda kit: (kit / "silo.key").chmod(0o644), "warning silo.key: "),
        (lambda kit: (kit / "ca.crt").write_text("no certificate"), "error   ca.crt: "),
        (lambda kit: (kit / "silo-0.csv").unlink(), "silo-0.csv: no such file; put the labelled text there, or change"),
        (lambda kit: change(kit, device="cuda:99"), "error   device: "),
        (lambda kit: (kit / SILO_FILE).write_text("id = 3"), "error   kit: "),
        (lambda kit: change(kit, slm=SLMSpec(model="./no")), "slm.model = './no': no such model folder"),
        (lambda kit: change(kit, slm=deeper(kit)), "error   slm: "),
        (lambda kit: change(kit, intake=IntakeConfig(max_bytes=1000)), "as an upload, and at most 1000 are allowed"),
    ],
)
def test_what_a_silo_lacks(kits, shell, damage, message):
    kit = kits / "silos" / "silo-0"
    damage(kit)
    code, out, _ = shell("doctor", kit)
    assert code == (0 if message.startswith("warning") else 2)
    assert message in out


@pytest.mark.parametrize(
    ("key", "value", "bad", "message"),
    [
        ("llm.vocabulary_texts", ("words.txt",), None, "words.txt: no such file"),
        ("gate.public_texts", "public.csv", None, "public.csv: no such file"),
        ("gate.public_texts", "public.csv", b"text,label\na good day,fine\n", "public.csv: row 1"),
        ("evaluation.perplexity_text", "long.txt", b"", "long.txt"),
    ],
)
def test_a_text_without_which_the_server_does_not_start_is_found(kits, key, value, bad, message):
    section, name = key.split(".")
    config, kit = server_config(kits / "server"), kits / "server"
    config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    config = config.model_copy(update={"data": config.data.model_copy(update={"dir": str(kit)})})
    if bad is not None:
        (kit / str(value)).write_bytes(bad)
    (finding,) = checkup._texts(config)
    assert (finding.level, finding.subject) == ("error", key)
    assert message in finding.message
    with pytest.raises(CrosslmError, match=re.escape(finding.message)):  # what Deployment.open calls, too
        original_llm(config, kit, print), public_texts(config), measured_on(config)
    if key == "evaluation.perplexity_text":
        (kit / str(value)).unlink()  # this text alone is measured where it is there
    else:
        config = server_config(kits / "server")
    assert list(checkup._texts(config)) == []


def test_doctor_looks_at_the_texts_of_a_server(kits, shell):
    path = kits / "server" / "config.toml"
    tables = tomllib.loads(path.read_text())
    tables["gate"] = tables.get("gate", {}) | {"public_texts": "public.csv"}
    path.write_text(tomli_w.dumps(tables))
    code, out, _ = shell("doctor", kits / "server")
    assert code == 2
    (error,) = lines(out, "error")
    assert error.startswith("error   gate.public_texts: ")


def test_of_a_server_the_test_rows_tell_the_language(kits, shell):
    rows = "".join(f"qzxv wkjp {row},{'good' if row % 2 else 'bad'}\n" for row in range(60))
    (kits / "server" / "test.csv").write_text("text,label\n" + rows)
    out = shell("doctor", kits / "server")[1]
    assert any("so that it was hardly made for their language" in line for line in lines(out, "warning")), out


def test_doctor_looks_at_a_silos_test_rows(kits, shell):
    kit = kits / "silos" / "silo-0"
    change(kit, data=read_silo(kit).data.model_copy(update={"test": "mine.csv"}))
    for text, level, message in (
        (None, "warning", "mine.csv is not there, or has no rows: no accuracy will be known here"),
        ("text,label\na good day,good\na bad day,bad\n", "warning", "mine.csv: 2 rows (bad 1, good 1); one row is 50"),
        ("text,label\na good day,fine\n", "error", "mine.csv: row 1"),
    ):
        if text:
            (kit / "mine.csv").write_text(text)
        code, out, _ = shell("doctor", kit)
        assert code == (2 if level == "error" else 0)
        assert any(line.startswith(f"{level:<7} data.test: ") and message in line for line in lines(out, level)), out


def test_a_silo_hears_of_rows_that_cannot_be_used(kits, shell):
    kit = kits / "silos" / "silo-0"
    with (kit / "silo-0.csv").open("ab") as file:
        file.write("grün,good\nschön,bad\n".encode("latin-1"))
    code, out, _ = shell("doctor", kit)
    assert code == 0
    assert any("silo-0.csv: 2 rows (16, 17) left out: not UTF-8" in line for line in lines(out, "warning"))


def test_a_silo_without_opacus_is_told_so_beside_all_else(kits, shell, monkeypatch):
    kit = kits / "silos" / "silo-0"
    change(kit, privacy=PrivacyConfig(epsilon=8.0), acceptance=AcceptanceConfig())
    monkeypatch.setitem(sys.modules, "opacus", None)
    code, out, _ = shell("doctor", kit)
    assert code == 2
    assert lines(out, "error") == [
        "error   privacy.epsilon: privacy.epsilon needs Opacus: pip install 'crosslm[privacy]'"
    ]
    assert "ok      slm: trains " in out


def test_a_silos_delta_is_looked_at_beside_its_rows(kits, shell):
    kit = kits / "silos" / "silo-0"
    for delta, level in ((0.9, "error"), (0.02, "warning")):
        change(kit, privacy=PrivacyConfig(epsilon=8.0, delta=delta), acceptance=AcceptanceConfig())
        _, out, _ = shell("doctor", kit)
        assert any(f"silo silo-0: privacy.delta = {delta} with" in line for line in lines(out, level))
        if level == "error":
            code, _, err = shell("client", kit)  # found now, and not when the server asks
            assert code == 2
            assert "silo silo-0: privacy.delta = 0.9 with" in err


def test_a_silos_budget_is_looked_at_beside_its_rows(kits, shell):
    kit = kits / "silos" / "silo-0"
    change(kit, privacy=PrivacyConfig(epsilon=0.01), acceptance=AcceptanceConfig())
    code, out, _ = shell("doctor", kit)
    assert code == 2
    assert any("silo silo-0: privacy.epsilon = 0.01 cannot be kept" in line for line in lines(out, "error"))


@pytest.mark.parametrize(("batch", "layers", "told"), [(200, 0, True), (4, 0, True), (16, 0, False), (200, 1, False)])
def test_a_batch_that_is_not_of_all_rows_is_told_where_the_head_alone_is_trained(kits, shell, batch, layers, told):
    kit = kits / "silos" / "silo-0"  # of 15 rows
    private = PrivacyConfig(epsilon=8.0, trained_layers=layers)
    change(kit, privacy=private, acceptance=AcceptanceConfig(), fit=FitConfig(batch_size=batch))
    out = shell("doctor", kit)[1]
    message = (
        f"privacy: silo silo-0: slm.private.batch_size = {batch} with 15 rows: a head alone was measured with batches "
        "of all rows (docs/privacy.md); set it to 15, which between machines is fit.batch_size in silo.toml"
    )
    assert any(message in line for line in lines(out, "warning")) == told, out


def test_a_server_looks_for_the_trackers_that_its_configuration_asks_for(kits, shell, monkeypatch):
    config = kits / "server" / "config.toml"
    tables = tomllib.loads(config.read_text())
    config.write_text(tomli_w.dumps(tables | {"tracking": ["mlflow"]}))
    monkeypatch.setattr("crosslm.runs.tracking._installed", lambda _: False)
    code, out, _ = shell("doctor", kits / "server")
    assert code == 2
    assert any(line.startswith("error   tracking: ") for line in lines(out, "error"))


def test_without_the_extra_it_says_so_and_looks_no_further(kits, shell, monkeypatch):
    monkeypatch.setattr(machine, "requires", lambda _: ["no-such-flower; extra == 'federation'"])
    code, out, _ = shell("doctor", kits / "server")
    assert code == 2
    assert "package no-such-flower: not installed; pip install 'crosslm[federation]'" in out
    assert "server.crt" not in out


def test_a_kit_says_which_wheel_to_install(federated, tmp_path):
    made(federated, tmp_path / "plain")
    made({**federated, "privacy": {"epsilon": 8.0}}, tmp_path / "private")
    for path, extras in (
        ("plain/server", "federation"),
        ("plain/silos/silo-0", "federation"),
        ("private/silos/silo-0", "federation,privacy"),
    ):
        assert (
            f"`pip install 'crosslm-{crosslm.__version__}-py3-none-any.whl[{extras}]' --constraint constraints.txt`"
            in (tmp_path / path / "README.md").read_text()
        )


def test_a_kit_is_no_configuration(kits, shell):
    code, _, err = shell("doctor", kits / "server", "--set", "seed=1")
    assert code == 2
    assert "--set and --data-dir are not for a kit" in err


def test_a_kit_of_the_other_side_is_named(kits, shell, monkeypatch):
    monkeypatch.setattr("crosslm.federation.flower.processes.end_on_sigterm", lambda: None)  # this process is pytest's
    for command, kit, right in (("server", "silos/silo-0", "client"), ("client", "server", "server")):
        code, _, err = shell(command, kits / kit)
        assert code == 2
        assert f"start it with: crosslm {right} " in err
