"""The bare side of `federation_live.py`: one array for each tensor through Flower and nothing else, as its examples do.

The silo loads, trains and saves the same SLM as ours does. Nothing is kept on the server's disk, looked at, or tried
again. Flower unpacks this file at both ends and runs it.
"""

import json
import os
import time
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from crosslm.federation.kits import KIT
from crosslm.federation.silo import Silo
from crosslm.models.sources import cache_folder

POLL = 0.5  # seconds, as in ours
client_app = ClientApp()
server_app = ServerApp()


def silo() -> Silo:
    """The silo of this kit."""
    return Silo(Path(os.environ[KIT]), cache_folder())


@client_app.train("upload")
def upload(message: Message, context: Context) -> Message:
    """Train and send."""
    weights = silo().client().train().slm.weights
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in weights.items()})
    return Message(RecordDict({"arrays": arrays}), reply_to=message)


@client_app.train("install")
def install(message: Message, context: Context) -> Message:
    """Take what came back."""
    slm = silo().slm()
    slm.model.load_state_dict(
        {name: torch.from_numpy(array.numpy()) for name, array in message.content["arrays"].items()}
    )
    slm.save(str(Path(os.environ[KIT]) / "state" / "slm"))
    return Message(RecordDict({"reply": ConfigRecord({"status": "ok"})}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Round after round; the seconds of each way go to the file that the run's configuration names."""
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(POLL)
    file, seconds = Path(str(context.run_config["file"])), []
    for _ in range(int(context.run_config["rounds"])):
        asked = time.time()
        reply = answer(grid, Message(RecordDict({"request": ConfigRecord({"round": 0})}), nodes[0], "train.upload"))
        came = time.time()
        answer(grid, Message(RecordDict({"arrays": reply.content["arrays"]}), nodes[0], "train.install"))
        seconds.append({"up": round(came - asked, 1), "down": round(time.time() - came, 1)})
        file.with_suffix(".part").write_text(json.dumps(seconds))
    file.with_suffix(".part").rename(file)


def answer(grid: Grid, message: Message) -> Message:
    """The reply to a message.

    Raises:
        RuntimeError: it is an error.
    """
    (sent,) = grid.push_messages([message])
    while not (replies := list(grid.pull_messages([sent]))):
        time.sleep(POLL)
    if replies[0].has_error():
        raise RuntimeError(replies[0].error)
    return replies[0]
