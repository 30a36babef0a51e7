"""The server application: the same loop as in one process, over Flower's grid."""

import os
import time
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from crosslm.errors import CrosslmError
from crosslm.federation.deployment import Deployment
from crosslm.federation.exchange import close, serve
from crosslm.federation.flower.exchange import FlowerExchange
from crosslm.federation.intake import Intake
from crosslm.federation.kits import KIT, read_server, server_config, silo_names
from crosslm.federation.opening import notes_of
from crosslm.federation.spool import OVER, Spool
from crosslm.models.sources import cache_folder
from crosslm.runs.tracking import tracked, wanted

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve uploads until the run is complete, measure the LLM, and wait until the downloads are delivered."""
    kit = Path(os.environ[KIT])
    spool = Spool(kit / "spool")
    spool.hold()
    spool.note("process", f"{os.getpid()} {time.time()}")
    try:
        serve_kit(kit, grid, spool)
    except CrosslmError as error:  # what is wrong stays wrong: crosslm server says it and ends
        spool.note("refused", str(error))
        raise


def serve_kit(kit: Path, grid: Grid, spool: Spool) -> None:
    """The whole run of a server's kit over a grid.

    Raises:
        CrosslmError: the kit's configuration, files or models cannot be used.
    """
    config = server_config(kit)
    wanted(config)  # a tracker that is not installed is found before models load
    intake = Intake(config.task.labels, config.intake)
    federation, names = config.federation, partial(silo_names, kit)
    exchange = FlowerExchange(grid, spool, read_server(kit).experiment, names(), federation, intake, names)
    delivery = config.federation.delivery_hours * 3600
    exchange.start()  # uploads are taken in while models load
    spool.works_on("loading models, and what comes before the first step")
    with (
        Deployment.open(kit / "run", config, cache_folder(), exchange.refuse, spool) as deployment,
        tracked(deployment.run, config, notes_of(deployment.run)),
    ):
        exchange.on_failure = deployment.failed
        spool.works_on("")
        serve(exchange, deployment.server, deployment, exchange.finished)
        try:
            if config.federation.closing:
                spool.works_on("the last step 5, for all")
                close(exchange, deployment.server, deployment, exchange.finished)
                spool.works_on("")
            spool.note(OVER, "1")
            deployment.complete(exchange.silos)  # while the last downloads are on their way: a report can be had now
            spool.works_on("")
        except CrosslmError:
            exchange.drain(delivery)  # what was trained goes to its silo all the same
            raise
        waiting = exchange.drain(delivery)
        deployment.summarise(exchange.silos)
    spool.note("finished", ",".join(waiting))
