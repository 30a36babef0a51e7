"""A silo between machines: what it remembers on its own disk from one request of the server to the next.

The client application may run in a new process for each message, so everything is kept in the kit's
``state`` folder. A request that comes twice is answered from there and nothing is trained twice.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import float16, float32

from crosslm.client import Client
from crosslm.config import DataConfig
from crosslm.data import is_there, load_examples
from crosslm.errors import DataError, FederationError
from crosslm.federation.intake import Intake
from crosslm.federation.kits import SILO_FILE, SiloSettings, read_silo
from crosslm.federation.messages import decode_download, decode_upload, describe, encode
from crosslm.files import write_whole
from crosslm.leaks import LeakCheck
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.private_fit import PrivateTraining
from crosslm.models.slm import SLM
from crosslm.models.sources import model_folder, resolve_device
from crosslm.records import Examples, SlmState, Upload
from crosslm.seeding import seed_for

DP_METRICS = ("epsilon", "delta", "clip", "noise_multiplier", "sample_rate", "steps", "means", "count_epsilon")
DTYPES = {"float32": float32, "float16": float16}


class Silo:
    """One silo's kit, its private text and its state. Nothing of the server's decides what is read here."""

    def __init__(self, kit: Path, cache: Path) -> None:
        """Open a kit.

        Raises:
            FederationError: it is not a silo's.
        """
        self.kit, self.cache = kit, cache
        self.settings: SiloSettings = read_silo(kit)
        self.state = kit / "state"

    @property
    def installed(self) -> int:
        """How many rounds are complete: uploaded, enhanced and installed."""
        path = self.state / "installed.json"
        return int(json.loads(path.read_text(encoding="utf-8"))["rounds"]) if path.exists() else 0

    @property
    def confirmed(self) -> bool:
        """Whether all rounds are complete and the server was told so."""
        path = self.state / "confirmed.json"
        told = int(json.loads(path.read_text(encoding="utf-8"))["rounds"]) if path.exists() else 0
        return told >= self.settings.max_participations

    def confirm(self) -> None:
        """Remember that the server was told of all rounds that are complete."""
        told = {"rounds": self.installed, "time": time.time()}
        write_whole(self.state / "confirmed.json", [json.dumps(told).encode()])

    def upload(self, experiment: str, number: int) -> bytes:
        """Step 1: the upload of a round, trained now or, if it was asked for before, as it was sent then.

        Args:
            experiment: whom the request is from.
            number: the round, from 0.

        Raises:
            FederationError: the request is not one that this silo answers.
            DataError: the private file cannot be used.
            ModelError: the SLM cannot be loaded.
        """
        self._check(experiment, number)
        path = self.state / f"upload-{number:04}.safetensors"
        if path.exists():
            return path.read_bytes()
        client = self.client()
        upload = client.train()
        data = encode(_as_dtype(upload, self.settings.wire_dtype))
        self._receipt(number, upload, data, client.slm)
        write_whole(path, [data])
        return data

    def install(self, experiment: str, number: int, data: bytes) -> dict[str, float]:
        """Step 5: keep the enhanced SLM, as ``state/slm`` for transformers.

        Returns:
            What the server is told: the round, whether the SLM was accepted, and no more.

        Raises:
            FederationError: it does not answer this silo's upload.
            UploadError: the download is refused by the intake's checks.
        """
        self._check(experiment, number)
        if self.installed > number:
            return self._confirmation(number)
        mine = self.state / f"upload-{number:04}.safetensors"
        if not mine.exists():
            raise FederationError(
                f"silo {self.settings.id}: a download for round {number}, which was never uploaded; give it back "
                f"the folder {self.state.name} that it had then"
            )
        settings = self.settings
        upload = self._uploaded(number)
        download = Intake(settings.labels, settings.intake).download(data, settings.id)
        if download.client_round != number:
            raise FederationError(
                f"silo {settings.id}: asked to install round {number}, got the download of round "
                f"{download.client_round}"
            )
        check_same_model(upload.slm, download.slm, f"silo {settings.id}")
        client = self.client()
        client.restore(upload.slm, number + 1, upload.class_counts, self._told(number + 1))
        decision = client.install(download)
        client.slm.save(str(self.state / "slm"))
        write_whole(self.state / f"download-{number:04}.safetensors", [data])
        write_whole(self.state / f"decision-{number:04}.json", [json.dumps(vars(decision), indent=1).encode()])
        write_whole(self.state / "installed.json", [json.dumps({"rounds": number + 1, "time": time.time()}).encode()])
        return self._confirmation(number)

    def decision(self, number: int) -> dict[str, Any]:
        """What was done with the SLM that a round brought, and why."""
        path = self.state / f"decision-{number:04}.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _confirmation(self, number: int) -> dict[str, float]:
        return {"round": float(number), "accepted": float(self.decision(number)["accepted"])}

    def client(self) -> Client:
        """The client of the method, with the SLM as it is after all complete rounds."""
        settings = self.settings
        private, slm, privacy, leaks = self.private(), self.slm(), None, None
        if settings.privacy.epsilon:
            privacy = PrivateTraining(settings.privacy, settings.max_participations)
        if settings.privacy.checks_leaks:
            encoder = SentenceEncoder(model_folder(settings.encoder, self.cache), resolve_device(settings.device))
            leaks = LeakCheck(private.texts, settings.privacy, encoder)
        accept = settings.acceptance
        client = Client(settings.id, private, slm, settings.fit, settings.seed, None, accept, privacy, leaks)
        if self.installed:
            counts = self._uploaded(self.installed - 1).class_counts
            client.restore(slm.to_state(), self.installed, counts, self._told(self.installed))
        return client

    def _uploaded(self, number: int) -> Upload:
        return decode_upload((self.state / f"upload-{number:04}.safetensors").read_bytes())

    def _told(self, rounds: int) -> list[Mapping[str, float]]:
        """The metadata of so many uploads: what they have spent of the privacy budget, whatever the kit says now."""
        return [self._uploaded(number).metrics for number in range(rounds)]

    def private(self) -> Examples:
        """The private rows.

        Raises:
            DataError: the file is not there or cannot be used; names file and row.
        """
        data = self.settings.data
        folder = str((self.kit / data.dir).absolute())
        config = DataConfig(
            dir=folder,
            train=data.train,
            test=data.train,
            text_column=data.text_column,
            label_column=data.label_column,
            label_names=data.label_names,
        )
        if not is_there(data.train, config):
            raise DataError(
                f"{Path(folder) / data.train}: no such file; put the labelled text there, "
                f"or change [data] of {self.kit / SILO_FILE}"
            )
        return load_examples(data.train, config, self.settings.labels).examples

    def slm(self) -> SLM:
        """The SLM as it is now: pretrained with a new head, as the server returned it, or as it was kept."""
        settings = self.settings
        device = resolve_device(settings.device)
        if self.installed:
            number = self.installed - 1
            if self.decision(number)["accepted"]:
                state = decode_download((self.state / f"download-{number:04}.safetensors").read_bytes()).slm
            else:
                state = self._uploaded(number).slm
            slm = SLM.from_state(state, device)
            slm.order_labels(settings.labels)
            slm.freeze_embeddings(settings.freeze_embeddings)
            return slm
        return SLM.load(
            model_folder(settings.slm.model, self.cache),
            settings.labels,
            settings.max_length,
            seed_for(settings.seed, "head", settings.id),
            settings.slm.num_hidden_layers,
            settings.freeze_embeddings,
            device,
            settings.slm.pooling,
        )

    def would_send(self) -> dict[str, Any]:
        """Every tensor and every field that an upload has, before anything is trained.

        Values that training gives are there as they are before it: no metrics, but their names are in
        ``metrics_after_training``.
        """
        private, slm = self.private(), self.slm()
        slm.predict_proba(private.texts[:1])  # a tokenizer that was used once has its truncation written in it
        counts = tuple(private.class_counts(len(self.settings.labels)))
        upload = Upload(self.settings.id, self.installed, counts, {}, slm.to_state())
        found, privacy = contents(_as_dtype(upload, self.settings.wire_dtype)), self.settings.privacy
        if privacy.epsilon:
            names = ["epochs", *(f"dp/{name}" for name in DP_METRICS)]
            if privacy.class_counts != "exact":
                hidden = privacy.class_counts == "hidden"
                found["fields"]["class_counts"] = [0] * len(counts) if hidden else "the counts, with noise"
        else:
            names = ["loss", "epochs"] + (["holdout_loss", "holdout_accuracy"] if self.settings.fit.patience else [])
        return {**found, "metrics_after_training": names}

    def receipts(self) -> list[dict[str, Any]]:
        """What left this silo so far, one receipt an upload."""
        paths = sorted((self.state / "receipts").glob("*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def _check(self, experiment: str, number: int) -> None:
        settings = self.settings
        if experiment != settings.experiment:
            raise FederationError(
                f"silo {settings.id}: takes part in {settings.experiment!r}, and not in {experiment!r}; "
                "start the server and the silo from kits that were made together"
            )
        if number >= settings.max_participations:
            raise FederationError(
                f"silo {settings.id}: agrees to {settings.max_participations} uploads (max_participations) "
                f"and was asked for number {number + 1}; raise that number in its kit if you agree to more"
            )
        if number > self.installed:
            raise FederationError(
                f"silo {settings.id}: was asked about round {number}, but has completed only {self.installed}; "
                f"give it back the state folder that this silo had before"
            )

    def _receipt(self, number: int, upload: Upload, data: bytes, slm: SLM) -> None:
        receipt = {"time": time.time(), "server": self.settings.server, "bytes_sent": len(data)}
        receipt |= contents(_as_dtype(upload, self.settings.wire_dtype))
        if self.settings.wire_dtype != "float32":
            private = self.private()
            rounded = SLM.from_state(_as_dtype(upload, self.settings.wire_dtype).slm, str(slm.device))
            rounded.order_labels(slm.labels)
            receipt["accuracy_on_private_rows"] = {
                "float32": slm.accuracy(private),
                self.settings.wire_dtype: rounded.accuracy(private),
            }
        path = self.state / "receipts" / f"upload-{number:04}.json"
        write_whole(path, [(json.dumps(receipt, indent=1) + "\n").encode()])


def contents(upload: Upload) -> dict[str, Any]:
    """All that is in an upload: every field by name, the tensors by shape, type and size."""
    state = upload.slm
    fields = {name: value for name, value in describe(upload).items() if name not in ("tensors", "bytes")}
    return {
        "fields": {
            **fields,
            "labels": list(state.labels),
            "max_length": state.max_length,
            "architecture": dict(state.architecture),
            "tokenizer": {name: f"{len(text.encode())} bytes" for name, text in state.tokenizer.items()},
        },
        "tensors": describe(upload)["tensors"],
        "tensor_bytes": describe(upload)["bytes"],
    }


def check_same_model(mine: SlmState, returned: SlmState, who: str) -> None:
    """Find out that what came back is the model that was sent, with other weights and nothing else.

    Raises:
        FederationError: it is another one.
    """
    if (mine.architecture, mine.tokenizer, mine.labels) != (returned.architecture, returned.tokenizer, returned.labels):
        raise FederationError(
            f"{who}: the SLM that came back has another architecture, tokenizer or label order, and is not installed; "
            "this silo must not be served by that server until its operator knows why"
        )
    if _shapes(mine.weights) != _shapes(returned.weights):
        raise FederationError(
            f"{who}: the SLM that came back has other tensors than the one that was sent, and is not installed; "
            "this silo must not be served by that server until its operator knows why"
        )


def _shapes(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _as_dtype(upload: Upload, name: str) -> Upload:
    dtype = DTYPES[name]
    weights = {
        key: weight.to(dtype) if weight.dtype == float32 else weight for key, weight in upload.slm.weights.items()
    }
    return replace(upload, slm=replace(upload.slm, weights=weights))
