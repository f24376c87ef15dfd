# What libnbd can say that its tools do not. Called with a host and a port that serve the exports of tests/common.
import errno
import sys

import nbd

host, port = sys.argv[1], int(sys.argv[2])

# Older versions of libnbd know no extended headers.
KNOWS_EXTENDED = hasattr(nbd.NBD, "set_request_extended_headers")


def connect(name, extended=True, structured=True, contexts=("base:allocation", "nbd-server:residency")):
    h = nbd.NBD()
    h.set_export_name(name)
    if KNOWS_EXTENDED:
        h.set_request_extended_headers(extended)
    h.set_request_structured_replies(structured)
    for context in contexts:
        h.add_meta_context(context)
    h.set_strict_mode(0)
    h.connect_tcp(host, str(port))
    return h

def fails(number, call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errnum == number, (e, number)
    else:
        raise AssertionError(f"no error {number}")

for extended, structured in [(True, True), (False, True), (False, False)]:
    extended = extended and KNOWS_EXTENDED
    h = connect("disk", extended, structured)
    assert not KNOWS_EXTENDED or h.get_extended_headers_negotiated() == extended
    assert h.get_structured_replies_negotiated() == (structured or extended)
    size = h.get_size()
    data = bytes(range(256)) * 64
    h.pwrite(data, 1000, nbd.CMD_FLAG_FUA)
    assert h.pread(len(data), 1000) == data
    h.zero(100, 1000, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)
    assert h.pread(200, 1000) == bytes(100) + data[100:200]
    h.trim(4096, 2 << 20, nbd.CMD_FLAG_FUA)
    h.cache(65536, 0)
    h.flush()
    fails(errno.EINVAL, h.pread, 512, size)
    fails(errno.ENOSPC, h.pwrite, b"x" * 512, size)
    fails(errno.ENOSPC, h.zero, 512, size)
    fails(errno.EINVAL, h.trim, 512, size)
    fails(errno.EINVAL, h.cache, 512, size)
    fails(errno.EINVAL, h.pread, 512, 2**64 - 512)
    fails(errno.EINVAL, h.pwrite, b"x" * 512, 0, nbd.CMD_FLAG_DF)
    assert h.pread(len(data), 1000)[200:] == data[200:]
    if structured or extended:
        seen = {}
        def extents(context, offset, entries, error):
            seen[context] = entries
        h.block_status(1 << 20, 0, extents)
        assert set(seen) == {"base:allocation", "nbd-server:residency"}, seen
        seen.clear()
        h.block_status(1 << 20, 0, extents, nbd.CMD_FLAG_REQ_ONE)
        assert all(len(entries) == 2 for entries in seen.values()), seen
        parts = []
        h.pread_structured(1 << 20, 32 << 20, lambda buf, offset, status, error: parts.append(status))
        assert parts == [nbd.READ_HOLE], parts
    if extended:
        seen.clear()
        h.block_status_filter(1 << 20, 0, ["nbd-server:residency"], extents)
        assert set(seen) == {"nbd-server:residency"}, seen
    h.shutdown()

if KNOWS_EXTENDED:
    h = connect("big")
    entries = []
    h.block_status_64(5 << 30, 0, lambda context, offset, found, error: entries.append(found))
    assert entries[0] == [(5 << 30, 3)], entries
    h.shutdown()

h = connect("ro")
assert h.is_read_only()
fails(errno.EPERM, h.pwrite, b"x", 0)
h.shutdown()

# Many at once, on several connections: a flush on one covers all.
handles = [connect("disk") for _ in range(4)]
assert all(h.can_multi_conn() for h in handles)
cookies = {h: [] for h in handles}
for i, h in enumerate(handles):
    for j in range(32):
        data = nbd.Buffer.from_bytearray(bytearray([i * 32 + j]) * 4096)
        cookies[h].append(h.aio_pwrite(data, (i * 32 + j) * 4096))
for h in handles:
    while h.aio_in_flight() > 0:
        h.poll(-1)
    # A write that failed raises here.
    for cookie in cookies[h]:
        assert h.aio_command_completed(cookie)
handles[0].flush()
image = handles[3].pread(128 * 4096, 0)
assert all(image[n * 4096:(n + 1) * 4096] == bytes([n]) * 4096 for n in range(128))
for h in handles:
    h.shutdown()

# Opt mode: the whole handshake by hand.
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_tcp(host, str(port))
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == ["big", "disk", "disk2", "lazy", "ro"], names
h.set_export_name("nobody")
fails(errno.ENOENT, h.opt_info)
fails(errno.ENOENT, h.opt_go)
h.set_export_name("disk")
contexts = []
h.opt_list_meta_context(contexts.append)
assert contexts == ["base:allocation", "nbd-server:residency"], contexts
h.set_request_block_size(True)
h.set_full_info(True)
h.opt_info()
assert h.get_canonical_export_name() == "disk"
assert h.get_export_description().endswith("in chunks of 65536")
h.opt_go()
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
h.shutdown()
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_tcp(host, str(port))
h.opt_abort()
print("all is well")
