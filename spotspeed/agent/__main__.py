"""`python -m spotspeed.agent --path URL --socket NAME`: become the saver of this node, or leave.

Exits 0 once a saver, this one or another, listens at the socket; the saver itself runs on outside
the caller's process tree.
"""

from __future__ import annotations

import argparse
import sys

from spotspeed.agent.process import detach, elect


def main() -> int:
    """Elect, detach, serve; returns the exit status."""
    parser = argparse.ArgumentParser(prog="spotspeed.agent", description=__doc__)
    parser.add_argument("--path", required=True, help="directory or URL of the store")
    parser.add_argument("--socket", required=True, help="name in the abstract socket namespace")
    arguments = parser.parse_args()
    listener = elect(arguments.socket)
    if listener is None:
        return 0
    log = detach(listener, arguments.socket)
    if log is None:
        return 0
    # Imported only now: what it brings in takes time and may start threads, which do not survive
    # a fork.
    from spotspeed.agent.server import Server

    Server(listener, arguments.path).run()
    log.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
