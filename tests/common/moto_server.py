"""moto_server with S3's promise: of many who put an object under a condition, one wins. On its own, moto looks whether the
condition holds and puts the object in two steps, with other threads in between."""

import sys
import threading

from moto.s3.responses import S3Response
from moto.server import main

one_at_a_time = threading.Lock()
put_object = S3Response.put_object


def put_object_alone(self):
    with one_at_a_time:
        return put_object(self)


S3Response.put_object = put_object_alone
sys.exit(main())
