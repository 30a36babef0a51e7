"""Start-up kits: the folders that ``crosslm provision`` makes, one for the server and one for each silo.

A kit is all that a party needs besides crosslm itself: its settings, its key, and the certificate of
the federation's authority. The authority's own key stays where the kits were made.
"""

import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from crosslm.config import (
    AcceptanceConfig,
    Config,
    FitConfig,
    IntakeConfig,
    PrivacyConfig,
    SelectionConfig,
    SLMSpec,
)
from crosslm.config_file import causes, explain, load
from crosslm.errors import FederationError
from crosslm.federation.kit_toml import commented
from crosslm.runs.folders import KIT_FILE, SILO_KIT_FILE, kits_in
from crosslm.runs.rundir import LOCK
from crosslm.sections.privacy import NO_ACCEPTANCE
from crosslm.sections.section import Device, Encoding, Positive, Section
from crosslm.sections.task import check_columns
from crosslm.support.commands import command
from crosslm.support.files import alone, missing

KIT = "CROSSLM_KIT"
"""Environment variable that tells Flower's processes which kit they run."""
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Environment in which Flower reports nothing and asks nothing of the internet."""
SERVER_FILE = KIT_FILE
SILO_FILE = SILO_KIT_FILE
Port = Annotated[int, Field(gt=0, lt=65536)]
Kit = TypeVar("Kit", bound=Section)


def is_kit(folder: Path) -> bool:
    """Whether ``crosslm provision`` made this folder."""
    return (folder / SERVER_FILE).is_file() or (folder / SILO_FILE).is_file()


class ServerSettings(Section):
    """``server.toml``: where the server listens and which experiment it runs; ``config.toml`` beside it is the rest."""

    experiment: str
    """Name of this federation with a random part; silos answer to no other."""
    address: str = Field(pattern=r"^[^\s:/]+:\d{1,5}$")
    """HOST:PORT that silos connect to, which is ``server`` in their kits. The server's certificate is for this HOST."""
    bind: str = "0.0.0.0"
    """Address of this machine that the gateway listens on."""
    superlink_port: Port = 9091
    """Port on the loopback interface for Flower's SuperLink; never opened to others."""


class SiloData(Section):
    """Where a silo's private text is."""

    dir: str = "."
    """Relative to the kit."""
    train: str
    """CSV, CSV.gz or JSONL file in ``dir``."""
    test: str | None = None
    """File of other labelled rows, of which nothing is learned: ``crosslm status`` says what the classifier makes of
    them before and after each round. Told to nobody else. Not set, or not there: not measured."""
    text_column: str = "text"
    """Column that holds the text."""
    label_column: str = "label"
    """Column that holds the label's name."""
    encoding: Encoding = "utf-8"
    """Of CSV and JSONL files, by a name that Python knows it by: a spreadsheet on Windows may write ``cp1252``."""
    label_names: dict[str, str] = Field(default={})
    """The label for each name that the file has another name for: ``neg = "negative"``."""
    skip_labels: tuple[str, ...] = ()
    """Labels of the file whose rows are left out; ``""`` for rows without one."""

    @model_validator(mode="after")
    def _two_columns(self) -> Self:
        check_columns(self.text_column, self.label_column)
        return self


class SiloSettings(Section):
    """``silo.toml``: all that a silo decides for itself. The server cannot change any of it."""

    id: str
    """The name that the server knows this silo's key by: not to be changed."""
    experiment: str
    """The federation that this silo takes part in; requests of any other are refused."""
    server: str = Field(pattern=r"^[^\s:/]+:\d{1,5}$")
    """HOST:PORT of the server's gateway."""
    labels: tuple[str, ...] = Field(min_length=2)
    """What texts are told apart by: the same in the same order at the server and at each silo."""
    seed: Annotated[int, Field(ge=0)] = 0
    """What is drawn by chance in training here is drawn from it, but for the noise and the coins of DP-SGD."""
    device: Device = "auto"
    """``auto`` (CUDA if there is one, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    runtime_port: Port = 9094
    """Port on the loopback interface for Flower's SuperNode; each silo on a machine needs its own."""
    wire_dtype: Literal["float32", "float16"] = "float32"
    """``float16``: weights travel in half the bytes both ways, rounded to 11 bits; the receipt says what that
    does to the accuracy on the private rows, and the silo keeps what it trained unrounded."""
    max_participations: Positive = 1
    """Uploads that this silo agrees to send in all."""
    closing: bool = False
    """After them the silo stays until the server has sent its closing download or says that there is none
    (``federation.closing``)."""
    data: SiloData
    slm: SLMSpec
    """The classifier that is trained here."""
    max_length: Positive = 128
    """Tokens of a text that the classifier reads."""
    freeze_embeddings: bool = False
    """Train all but the word vectors, which would tell which words were in the rows (docs/privacy.md)."""
    fit: FitConfig = FitConfig()
    """Step 1: training on the private rows; in the configuration ``private`` under ``[slm]``."""
    acceptance: AcceptanceConfig = AcceptanceConfig()
    """Whether an SLM that comes back is tried on held-out private rows before it is installed."""
    intake: IntakeConfig = IntakeConfig()
    """Bounds of what may come back."""
    privacy: PrivacyConfig = PrivacyConfig()
    """DP-SGD in step 1, what is told of the class counts, and the leak check (its encoder is named above)."""
    encoder: str = SelectionConfig().encoder
    """Sentence transformer of the leak check; used with ``privacy.max_shared_words`` or ``privacy.max_similarity``
    alone."""

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must differ from each other, found {list(self.labels)}")
        return self

    @model_validator(mode="after")
    def _no_acceptance_under_dp(self) -> Self:
        if self.privacy.epsilon is not None and self.acceptance.enabled:
            raise ValueError(NO_ACCEPTANCE)
        return self


def read_server(kit: Path) -> ServerSettings:
    """The settings in a server's kit.

    Raises:
        FederationError: it is not one, or a setting is wrong.
    """
    return _read(kit, SERVER_FILE, ServerSettings)


def read_silo(kit: Path) -> SiloSettings:
    """The settings in a silo's kit.

    Raises:
        FederationError: it is not one, or a setting is wrong.
    """
    return _read(kit, SILO_FILE, SiloSettings)


def server_config(kit: Path) -> Config:
    """The configuration of the run in a server's kit."""
    return load(kit / "config.toml")


def silo_names(kit: Path) -> list[str]:
    """The silos that a server's kit knows, which are those with a public key in it."""
    return sorted(path.stem for path in (kit / "silos").glob("*.pub"))


@contextmanager
def held(kit: Path) -> Iterator[None]:
    """Keep every other process from running this kit, since both would use the same ports, keys and state.

    Raises:
        FederationError: another one runs it, or the kit cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(alone(kit / LOCK))
        except BlockingIOError as error:
            raise FederationError(
                f"{kit}: is run by another process already (crosslm server or client); "
                "leave that one at work, or end it first"
            ) from error
        except OSError as error:
            raise FederationError(f"{kit}: cannot be written: {error}; it must be writable for this user") from error
        yield


def dump(settings: Section) -> str:
    """Settings as TOML, with what each key means; of ``privacy`` what was not set are comments."""
    return commented(settings, quiet=("privacy",))


def _read(kit: Path, name: str, kind: type[Kit]) -> Kit:
    path = kit / name
    if not kit.exists():
        raise FederationError(f"{missing(kit)}; name a folder that crosslm provision made")
    if not path.is_file():
        other, program = (SILO_FILE, "client") if name == SERVER_FILE else (SERVER_FILE, "server")
        if (kit / other).is_file():
            raise FederationError(
                f"{kit}: is the kit of a {'silo' if program == 'client' else program}; "
                f"start it with: {command(program, kit)}"
            )
        if kits := kits_in(kit):
            raise FederationError(f"{kit}: has the kits of a federation in it; give one of them: {kits}")
        raise FederationError(
            f"{kit}: has no {name}, so it is no kit of this kind; name a folder that crosslm provision made"
        )
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FederationError(f"{path}: cannot be read as a TOML file: {error}; mend it") from error
    except ValidationError as error:
        raise FederationError("\n".join(explain(str(path), entry, kind) for entry in causes(error))) from None
