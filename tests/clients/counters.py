"""Writes a growing number into blocks of an export, in random order and several at a time, until the server dies.

Each line of the output is one fact: `i BLOCK NUMBER` before a write is sent, `a BLOCK NUMBER` after its reply, `f` after
a flush. Of the blocks only every STRIDE-th is touched, from FIRST on, so that several such clients share an export, and
its chunks, without sharing a block.
Of a thousand writes PER_MILLE are followed by a flush, and as many have FUA.
Usage: counters.py URI BLOCKS FIRST STRIDE PER_MILLE SEED START
"""

import random
import sys

import nbd

BLOCK = 4096
IN_FLIGHT = 8
uri = sys.argv[1]
blocks, first, stride, per_mille, seed, number = map(int, sys.argv[2:])
chance = random.Random(seed)
busy = set()


def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def write(handle, block, number, flags):
    def replied(error):
        if error.value == 0:
            busy.discard(block)
            say("a", block, number)
        return 1

    busy.add(block)
    say("i", block, number)
    data = nbd.Buffer.from_bytearray(bytearray(number.to_bytes(8, "little") * (BLOCK // 8)))
    handle.aio_pwrite(data, block * BLOCK, completion=replied, flags=flags)


handle = nbd.NBD()
handle.connect_uri(uri)
say("connected")
try:
    while True:
        number += 1
        block = chance.randrange(first, blocks, stride)
        while block in busy or len(busy) >= IN_FLIGHT:
            handle.poll(-1)
        write(handle, block, number, nbd.CMD_FLAG_FUA if chance.randrange(1000) < per_mille else 0)
        if chance.randrange(1000) < per_mille:
            # Writes of this connection and of others are under way.
            handle.flush()
            say("f")
except nbd.Error as error:
    print(error, file=sys.stderr)
