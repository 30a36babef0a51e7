"""The texts of a start-up kit: how it is started, what it says of itself, and the app that Flower hands out."""

from crosslm import __version__
from crosslm.data.hub import HUB
from crosslm.models.sources import PREFIX

WHEEL = f"crosslm-{__version__}-py3-none-any.whl"
"""What ``pip wheel`` makes of this version; a kit's README says to install it."""
FLOWER_APP = """\
# The app that Flower hands to the silos. It holds no code: each silo runs the crosslm that it installed itself.
[project]
name = "crosslm-federation"
version = "1.0.0"
description = "Names the applications inside the installed crosslm package"
license = { text = "Apache-2.0" }
dependencies = []

[tool.flwr.app]
publisher = "crosslm"

[tool.flwr.app.components]
serverapp = "crosslm.federation.flower.server_app:app"
clientapp = "crosslm.federation.flower.client_app:app"
"""
UNIT = """\
# systemd unit: copy to /etc/systemd/system, set WorkingDirectory to this kit and, if crosslm is in a virtual
# environment, ExecStart to the whole path of that crosslm; make a user crosslm that the kit belongs to, or name
# another one under User; then: systemctl enable --now {name}
# (Converted models are kept in /var/cache/crosslm, which systemd makes for that user, who needs no home folder.)
[Unit]
Description=crosslm {what}
After=network-online.target
Wants=network-online.target

[Service]
User=crosslm
UMask=0077
CacheDirectory=crosslm
CacheDirectoryMode=0700
Environment=CROSSLM_CACHE=%C/crosslm
WorkingDirectory=/srv/crosslm/{folder}
ExecStart=/usr/bin/env crosslm {command} .
# a run that is complete (0), a setting that is wrong (2) or Ctrl-C (130): starting again does not help
Restart=on-failure
# what it ends with when it is told to end
SuccessExitStatus=143
RestartPreventExitStatus=2 130
RestartSec=5
NoNewPrivileges=true
PrivateTmp=true

[Install]
WantedBy=multi-user.target
"""
START = """\
#!/bin/sh
# Starts what is in this kit, and starts it again when it dies; ends it when it is told to end itself (Ctrl-C, kill,
# docker stop). Needs crosslm on the PATH: activate its virtual environment first.
cd "$(dirname "$0")" || exit 1
runs=
stop() {{
    trap '' HUP INT QUIT TERM
    [ -n "$runs" ] && [ -n "$!" ] && kill "$!" 2>/dev/null && wait "$!"
    exit "$1"
}}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 131' QUIT
trap 'stop 143' TERM
while true; do
    runs=yes
    crosslm {command} . &
    wait "$!"
    code=$?
    runs=
    [ $code -eq 0 ] && exit 0
    [ $code -eq 2 ] && exit 2 # a setting is wrong: starting again does not help
    [ $code -eq 130 ] && exit 130 # stopped from the keyboard
    sleep 5
done
"""
SERVER_README = """\
# crosslm server of {experiment}

1. `pip install '{wheel}[{extras}]' --constraint constraints.txt`, in the version of the silos: the wheel is made in
   crosslm's source folder by `pip wheel --no-deps .`, and carried here with `constraints.txt` of that folder, the
   versions that were tested.
2. Check `config.toml` (the task, the LLM) and `server.toml` (where to listen). Files that `config.toml` names for the
   server (`data.test`, `llm.vocabulary_texts`, `gate.public_texts`) belong into this folder; without the file of
   `data.test` no accuracy is known here. Files of silos (`clients.train`) do not belong here.
3. `crosslm doctor .` looks for what would stop it.
4. `crosslm server .`, or `./start.sh`, or the systemd unit `crosslm-server.service`: each starts again what dies.
5. `crosslm status .` says who has uploaded, what is being trained, what waits, and since when.

Silos must reach {address}. Nothing else needs to be open: Flower's SuperLink, whose control interface
knows no accounts, listens on the loopback interface, and the gateway in front of it passes on only what
silos ask. `server.key` is this server's secret. Results come in `run/` (`crosslm report run`), uploads as they came in
`spool/`.
"""
SILO_README = """\
# crosslm silo {silo} of {experiment}

1. `pip install '{wheel}[{extras}]' --constraint constraints.txt`, in the version of the server: whoever sent this kit
   has both files: the wheel is made in crosslm's source folder by `pip wheel --no-deps .`, and `constraints.txt` of
   that folder has the versions that were tested.
2. Put your labelled text where `silo.toml` says (`data`), or change that. The server cannot see or change `silo.toml`.
   `data.test` may name a file of other labelled rows: nothing is learned of them, and nobody is told;
   `crosslm status .` says how many of them the classifier gets right before and after.
3. `crosslm doctor .` looks for what would stop it; `crosslm client . --dry-run` prints every tensor and every field
   that would leave, and sends nothing.
4. `crosslm client .`, or `./start.sh`, or the systemd unit `crosslm-silo.service`: each starts again what dies.
5. `crosslm status .` says what was sent and what came back. The enhanced classifier is in `state/slm/`;
   `crosslm predict . FILE` classifies with it.

Only an outgoing connection to {address} is made. `silo.key` is this silo's secret: with it anybody is this
silo. After each upload, `state/receipts/` says what left.
"""


def server_readme(experiment: str, address: str, needs: list[str]) -> str:
    """README of the server's kit; what it says to install brings these models and datasets."""
    return SERVER_README.format(experiment=experiment, address=address, wheel=WHEEL, extras=_extras(needs))


def silo_readme(silo: str, experiment: str, address: str, needs: list[str], private: bool) -> str:
    """README of a silo's kit; ``private``: it trains with differential privacy."""
    extras = _extras(needs) + (",privacy" if private else "")
    return SILO_README.format(silo=silo, experiment=experiment, address=address, wheel=WHEEL, extras=extras)


def start_script(command: str) -> str:
    """``start.sh`` of a kit that ``crosslm COMMAND .`` runs."""
    return START.format(command=command)


def systemd_unit(name: str, command: str, folder: str) -> str:
    """The systemd unit NAME.service of a kit that lies in a folder of this name."""
    what = "server" if command == "server" else f"silo {folder}"
    return UNIT.format(name=name, what=what, folder=folder, command=command)


def _extras(needs: list[str]) -> str:
    """What a party installs: the packages that hold models come with the demo's."""
    demo = ",demo" if any(need.startswith(PREFIX) for need in needs) else ""
    return f"federation{demo}" + (",datasets" if any(need.startswith(HUB) for need in needs) else "")
