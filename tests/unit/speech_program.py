"""A program of the line protocol of `speech.command`: it whistles, and does what a recording's id asks for.

Words: LOG FOLDER. What it is asked for goes into LOG; in FOLDER it remembers what it has done once.
"""

import json
import math
import os
import signal
import struct
import sys
import time
import wave
import zlib
from pathlib import Path

log, folder = Path(sys.argv[1]), Path(sys.argv[2])


def once(name: str) -> bool:
    if (folder / name).exists():
        return False
    (folder / name).touch()
    return True


def whistle(path: str, name: str, rate: int = 16000, seconds: float = 0.5, level: float = 0.3) -> None:
    pitch = 200 + zlib.crc32(name.encode()) % 400
    samples = (level * math.sin(2 * math.pi * pitch * i / rate) for i in range(round(rate * seconds)))
    with wave.open(path, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(b"".join(struct.pack("<h", round(32767 * max(-1.0, min(1.0, one)))) for one in samples))


print("loading …", flush=True)  # what is no JSON is passed over
print(json.dumps({"name": "whistle", "version": "1.0", "languages": ["de", "fr", "it"]}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    name, out = asked["id"], asked["out"]
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{name} {asked['language']} {asked['text']}\n")
    with wave.open(asked["source"]) as heard:
        assert (heard.getframerate(), heard.getnchannels()) == (16000, 1)
    answer = {"id": name}
    if name.startswith("dies") and (once(name) or not name.startswith("dies-once")):
        sys.exit("out of memory")
    elif name.startswith("hangs"):
        time.sleep(60)
    elif name.startswith("stops") and once(name):
        os.kill(os.getppid(), signal.SIGUSR1)
    while name.startswith("floods"):
        print("retrying", flush=True)
    if name.startswith("error"):
        answer["error"] = "no such\nspeaker"
    elif name.startswith("nonsense"):
        Path(out).write_bytes(b"RIFF but no more")
    elif name.startswith("quiet"):
        whistle(out, name, level=0.0)
    elif name.startswith("loud"):
        whistle(out, name, 24000 if name.endswith("rate") else 16000, level=4.0)
    elif name.startswith("short"):
        whistle(out, name, seconds=0.1)
    elif not name.startswith("nothing"):
        whistle(out, name + asked["language"], 24000 if name.startswith("rate") else 16000)
    print(json.dumps(answer), flush=True)
