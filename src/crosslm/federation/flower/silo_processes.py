"""A silo's processes: Flower's SuperNode, which connects to the server, and ours, which answers what it receives.

Both are started again when one dies.
"""

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosslm.errors import FederationError, PassingError
from crosslm.federation.flower.processes import RESTART, Child, Note, program, wait_until_free
from crosslm.federation.flower.questions import ask, is_over, rounds_complete, wait_for_server
from crosslm.federation.kits import SILO_FILE, read_silo
from crosslm.federation.silo_news import closing_outcome, outcome
from crosslm.federation.silo_state import SiloState
from crosslm.support.files import settle_folder
from crosslm.support.plain import plain

REFUSED = "Failed to activate SuperNode"  # what Flower says to a key that it does not know
REFUSED_PAUSE = 10.0  # seconds until a silo that was refused tries again
ASK = 5.0  # seconds between two questions whether anything more comes: the server stays longer than that
CONFIRM_TIME = 300.0  # seconds that a silo with all its rounds stays to tell the server of the last one
MAX_LINE = 300  # letters of a line of Flower's that is shown
GIVE_UP = 86400.0  # seconds after which a server that has not answered is not coming back
UNCONFIRMED = (
    "all rounds are complete and the classifier is installed, but the server has not said that it knows of the last "
    "one, and waits for it until federation.delivery_hours are over"
)


def supernode_command(kit: Path) -> list[str]:
    """The command line of the SuperNode of a kit.

    With ``--isolation process`` it starts no program for the app that the server sends: who answers is
    :func:`tasks_command`. (Flower's ``--trusted-entities`` would not do: a server without its app hub cannot vouch
    for any app, and who can sign one could sign code.)
    """
    settings = read_silo(kit)
    return [
        program("flower-supernode"),
        "--root-certificates",
        str(kit / "ca.crt"),
        "--superlink",
        settings.server,
        "--host",
        "127.0.0.1",
        "--port",
        str(settings.runtime_port),
        "--auth-supernode-private-key",
        str(kit / "silo.key"),
        "--isolation",
        "process",
    ]


def tasks_command(kit: Path) -> list[str]:
    """The command line of the process that answers what the SuperNode of a kit receives."""
    return [sys.executable, "-m", "crosslm.federation.flower.tasks", f"127.0.0.1:{read_silo(kit).runtime_port}"]


def run_silo(silo: SiloState, note: Note) -> None:
    """Stay connected until all rounds that this silo agrees to are complete and the server knows it.

    Raises:
        FederationError: the server's certificate is not the federation's, it does not know this silo's key, the
            run is over without this silo, or another process has the port ``runtime_port``.
        PassingError: the server has not said that it knows of the last round.
    """
    if silo.confirmed:
        _took_part(silo)
        note(f"silo {silo.settings.id}: all {silo.installed} rounds that it agreed to are complete")
        return
    settle_folder(silo.state / "slm")
    kit = silo.kit.absolute()
    node = Child("supernode", supernode_command(kit), kit)
    tasks = Child("tasks", tasks_command(kit), kit)
    _make_room(silo, node, tasks)
    told = silo.answered, len(silo.receipts())
    said_refused, refused = silo.doing(), False
    has_all = silo.complete >= silo.agreed
    if not wait_for_server(silo.settings.server, kit / "ca.crt", note, CONFIRM_TIME if has_all else None):
        _end_unconfirmed(silo, note)
        return
    rounds_complete(silo)
    note(f"silo {silo.settings.id}: connecting to {silo.settings.server}")
    is_known = False
    asked = until = 0.0  # when to end at the latest: an answer that the server has not read is lost when the silo goes
    try:
        while not until or (time.time() < until and not (is_known := (rounds_complete(silo) or 0) >= silo.answered)):
            if node.process is None or node.died() or tasks.died():
                refused = _start_node(silo, node, tasks, refused, note)
            if not tasks.runs() and node.listens_on(silo.settings.runtime_port):
                tasks.start()  # not before: another silo's node may be faster, and what it receives is not for us
            told = _tell(silo, told, note)
            if (doing := silo.doing()) and doing["now"] == "refused" and doing["why"] != _why(said_refused):
                note(f"a request of the server was refused here: {plain(doing['why'])}; it asks again")
            said_refused = doing
            if silo.complete >= silo.agreed and not until:
                until = time.time() + CONFIRM_TIME
            elif not until and time.time() > asked + ASK:
                asked = time.time()
                if is_over(silo) and silo.closed is None:
                    silo.nothing_more()
                    note(f"silo {silo.settings.id}: the run is over; nothing more comes")
            time.sleep(0.5)
        if not is_known:
            _end_unconfirmed(silo, note)
            return
        silo.confirm()
        _took_part(silo)
    finally:
        tasks.stop()
        node.stop()


def _start_node(silo: SiloState, node: Child, tasks: Child, refused: bool, note: Note) -> bool:
    """Start the SuperNode, again where it or ``tasks`` has ended; whether the server has refused it."""
    is_tasks_end = tasks.died()
    tasks.stop()  # what it trains is for a SuperNode that is gone
    if node.died():
        refused = _look_into_end(node, silo, refused, note)
        time.sleep(REFUSED_PAUSE if refused else RESTART)
    elif is_tasks_end:
        note(f"the process that trains ended and is started again; its log is {tasks.log}")
        node.stop()
        time.sleep(RESTART)
    _make_room(silo, node, tasks)
    node.start()
    return refused


def _make_room(silo: SiloState, node: Child, tasks: Child) -> None:
    """End what an earlier start left behind, and see to it that this silo's SuperNode can have its port.

    Without its port it ends at once, and ``tasks`` would take the work of the silo that has it.

    Raises:
        FederationError: another process has it.
    """
    for child in (tasks, node):
        child.end_orphan()
    port = silo.settings.runtime_port
    if not wait_until_free("127.0.0.1", port):
        raise FederationError(
            f"silo {silo.settings.id}: port {port} of this machine (runtime_port) is in use by another process, "
            f"another crosslm client perhaps; set another number there in {silo.kit / SILO_FILE}, or end that process"
        )


def _end_unconfirmed(silo: SiloState, note: Note) -> None:
    """End without the server's word that it knows of the last round: it may be away for now, or for good.

    Raises:
        PassingError: the round was completed in the last day.
    """
    since = float((silo.doing() or {}).get("since", time.time()))
    if time.time() - since < GIVE_UP:
        raise PassingError(f"silo {silo.settings.id}: {UNCONFIRMED}; start crosslm client again for that")
    note(f"silo {silo.settings.id}: {UNCONFIRMED}; it has been a day")


def _took_part(silo: SiloState) -> None:
    """Whether any round of this silo is complete, now that nothing more comes.

    Raises:
        FederationError: none is.
    """
    if not silo.installed:
        why = closing_outcome(silo.closed or {})
        raise FederationError(f"silo {silo.settings.id}: {why}; the kit of a new run is needed")


def _why(doing: Mapping[str, Any] | None) -> str | None:
    return doing["why"] if doing and doing["now"] == "refused" else None


def _tell(silo: SiloState, told: tuple[int, int], note: Note) -> tuple[int, int]:
    """Say what is new since so many rounds were complete and so many receipts written; gives both as they are now."""
    complete, sent = silo.answered, len(silo.receipts())
    if sent > told[1]:
        note(f"trained; the receipt of what leaves is {silo.kit / 'state' / 'receipts' / f'upload-{sent - 1:04}.json'}")
    if complete > told[0] and silo.closed is not None:
        note(f"in the end: {closing_outcome(silo.closed)}; it is in {silo.kit / 'state' / 'slm'}")
    elif complete > told[0]:
        what = outcome(silo.decision(complete - 1))
        note(f"round {complete - 1} is complete: {what}; it is in {silo.kit / 'state' / 'slm'}")
    return complete, sent


def _errors_in(words: str) -> str:
    """What a process of Flower's says of errors at last, or else its last lines; empty where it says nothing."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", words).splitlines()
    errors = [line for line in lines if line.lstrip().startswith("ERROR")] or lines
    return "".join(f"\n  {plain(line[:MAX_LINE]).strip()}" for line in errors[-2:])


def _look_into_end(node: Child, silo: SiloState, refused: bool, note: Note) -> bool:
    """Say why the SuperNode ended; whether it was refused.

    A server that has just been started has not told Flower of the key yet, and one whose silo was killed keeps
    the old connection for about a minute: a refusal of a key that the server's kit has is not final.

    Raises:
        FederationError: the server does not know this silo's key.
    """
    answer = ask(silo)
    if REFUSED not in node.last_words():
        why = f": {answer.clock}" if answer and answer.clock else ""
        note(f"the SuperNode ended and is started again{why}; its log is {node.log}{_errors_in(node.last_words())}")
        return False
    if not refused:
        note("the server does not accept this silo yet; trying again")
    return True
