"""Buckets of Google Cloud Storage on this machine, for tests: an emulator, and what reaches it.

    python tests/bucket_emulator.py PORT

runs it alone, in memory, until it is killed.
"""

import contextlib
import json
import logging
import sys
import threading
import urllib.parse
from functools import partial
from http import server

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = 'bucket-of-tests'


class Handler(RequestHandler):
    """The emulator's, which obeys preconditions, as locks need them, and grants what it is told."""

    granted: set[str] | None = None  # permissions; None is all

    def do_POST(self):
        if self._passes(self._query('name')):
            super().do_POST()

    def do_DELETE(self):
        if self._passes(self._name()):
            super().do_DELETE()

    def do_GET(self):
        if '/iam/testPermissions' in self.path and self.granted is not None:
            asked = urllib.parse.parse_qs(self.path.partition('?')[2])['permissions']
            self._answer(200, {'permissions': [p for p in asked if p in self.granted]})
        else:
            super().do_GET()

    def end_headers(self):
        if self.command == 'GET' and self._query('alt') == 'media':
            self.send_header('x-goog-generation', self._generation(self._name()))
        super().end_headers()

    def _name(self) -> str:
        return urllib.parse.unquote(self.path.partition('?')[0].partition('/o/')[2])

    def _generation(self, name: str) -> str:
        bucket = self.path.partition('/b/')[2].partition('/')[0]
        return self.storage.objects.get(bucket, {}).get(name, {'generation': '0'})['generation']

    def _query(self, name: str) -> str:
        return urllib.parse.parse_qs(self.path.partition('?')[2]).get(name, [''])[0]

    def _passes(self, name: str) -> bool:
        wanted = self._query('ifGenerationMatch')
        if not wanted or wanted == self._generation(name):
            return True
        self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self._answer(412, {'error': {'code': 412, 'message': 'conditionNotMet'}})
        return False

    def _answer(self, code: int, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(server.HTTPServer):
    request_queue_size = 100

    def handle_error(self, *_):  # clients that hang up, such as those that are killed
        pass


def _serve(port: int = 0) -> _Server:
    logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    return _Server(('localhost', port), partial(Handler, storage))


@contextlib.contextmanager
def running():
    """Runs an emulator with one bucket in a thread; yields its address."""
    with _serve() as served:
        threading.Thread(target=served.serve_forever, args=[0.05], daemon=True).start()
        yield f'http://localhost:{served.server_port}'
        served.shutdown()


def environment(url: str) -> dict[str, str]:
    """What Orbax's, gcsfs's and Google's own clients take the address from."""
    return {
        'STORAGE_EMULATOR_HOST': url,
        'TENSORSTORE_GCS_HTTP_URL': url,
        # Would ask Google, by another protocol, for the kind of bucket.
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
        'NO_GCE_CHECK': 'true',
    }


if __name__ == '__main__':
    _serve(int(sys.argv[1])).serve_forever()
