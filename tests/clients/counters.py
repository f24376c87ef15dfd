"""Writes a growing number into every block of an export, in random order, until the server dies.

Each line of the output is one fact: `i BLOCK NUMBER` before a write is sent, `a BLOCK NUMBER` after its reply,
`f` after a flush, of which everything acknowledged before `b` is covered.
Usage: counters.py URI BLOCKS SEED START
"""

import random
import sys

import nbd

BLOCK = 4096
uri, blocks, seed, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
chance = random.Random(seed)


def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


handle = nbd.NBD()
handle.connect_uri(uri)
say("connected")
try:
    while True:
        number += 1
        block = chance.randrange(blocks)
        say("i", block, number)
        handle.pwrite(number.to_bytes(8, "little") * (BLOCK // 8), block * BLOCK, nbd.CMD_FLAG_FUA if number % 50 == 0 else 0)
        say("a", block, number)
        if chance.random() < 0.05:
            say("b")
            handle.flush()
            say("f")
except nbd.Error as error:
    print(error, file=sys.stderr)
