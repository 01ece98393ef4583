"""A process that looks in the place of doctor's, and does what real ones do on a bad day.

python -m odd_worker FD OPTIONS CHECK ...
"""

import json
import os
import signal
import subprocess
import sys
import time


def main(descriptor: int, names: list[str]) -> None:
    channel = os.fdopen(descriptor, "w")

    def send(**message: object) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    for name in names:
        send(begin=name)
        if name == "hangs":
            child = subprocess.Popen(["sleep", "60"], process_group=0)  # as ninja starts a compiler
            print(f"started {child.pid}", flush=True)
            time.sleep(60)
        if name == "crashes":
            print("about to crash", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "leaves":
            print("words\n\x1b[31mlast words\x1b[0m\n", flush=True)
            sys.exit(7)
        if name == "talks":
            send(note="this takes a while")
            print("libraries print here")
        row = {"name": name, "status": "ok", "found": str(os.getpid()), "advice": "", "varies": False}
        send(findings=[row], is_last=name == "is the last")
        if name == "is the last":
            return


main(int(sys.argv[1]), sys.argv[3:])
