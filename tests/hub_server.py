"""A Hub on loopback: the part of the Hub's HTTP interface that huggingface-hub's client uses, and plain files.

Large files go through LFS and small ones into the commit, as on the real Hub. Ids of commits follow from their content,
so that two histories can be compared. `fail` makes the next requests fail.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

TOKEN = 'hf_test'  # noqa: S105
_CHUNK = 1 << 20


@dataclass
class Fault:
    method: str
    path: str
    """Pattern to find in the path."""
    status: int | None = None
    """Status to answer instead of doing what was asked. None does it."""
    after_bytes: int | None = None
    """Cut the connection after so many bytes of the body."""
    drop_answer: bool = False
    """Do what was asked, then cut the connection instead of answering."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of the answer with `status`."""
    before: Callable[[], object] | None = None
    """Called before anything else."""
    times: int = 1


@dataclass
class Repository:
    commits: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Ids, and files as path to sha256, oldest first."""
    lfs: set[str] = field(default_factory=set)

    def commit(self, files: dict[str, str]) -> str:
        parent = self.commits[-1][0] if self.commits else ''
        oid = hashlib.sha1((parent + json.dumps(files, sort_keys=True)).encode()).hexdigest()  # noqa: S324
        self.commits.append((oid, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, str]] | None:
        if revision == 'main':
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, blobs: Path) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.blobs = blobs
        self.repositories: dict[str, Repository] = {}
        self.files: dict[str, str] = {}
        """Plain files of other servers, `host/path` to sha256."""
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.delay_s = 0.0
        """Delay before each chunk of a large file."""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'

    def env(self, home: Path, **extra: str) -> dict[str, str]:
        """Environment variables of a client with its own home, and so its own cache."""
        return {
            'HF_ENDPOINT': self.url,
            'HF_HOME': str(home),
            'HF_TOKEN': TOKEN,
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
        } | extra

    def state(self) -> dict[str, list[tuple[str, dict[str, str]]]]:
        return {name: repository.commits for name, repository in sorted(self.repositories.items())}

    def count(self, method: str, path: str) -> int:
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)

    def fail(self, method: str, path: str, **how: object) -> None:
        self.faults.append(Fault(method, path, **how))

    def put(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.blobs / sha256).write_bytes(content)
        return sha256

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore it: a client may have been killed."""


@contextlib.contextmanager
def hub_server(folder: Path) -> Iterator[HubServer]:
    folder.mkdir(parents=True, exist_ok=True)
    with HubServer(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class ToLoopback(urllib.request.HTTPSHandler):
    """Sends what urllib asks of other servers to this one."""

    def __init__(self, server: HubServer) -> None:
        super().__init__()
        self.server = server

    def https_open(self, request: urllib.request.Request) -> object:
        return self.parent.open(f'{self.server.url}/web/{request.host}{request.selector}')


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    # ------------------------------------------------------------------------------------------ routing

    def _dispatch(self) -> None:
        path = self.path.split('?')[0]
        with self.server.lock:
            self.server.requests.append((self.command, path))
            self.fault = next(
                (f for f in self.server.faults if f.times and f.method == self.command and re.search(f.path, path)),
                None,
            )
            if self.fault:
                self.fault.times -= 1
        if self.fault and self.fault.before:
            self.fault.before()
        if self.fault and self.fault.status:
            self._body()
            return self._json({'error': 'as told'}, self.fault.status, self.fault.headers)
        open_to_all = self.command in ('GET', 'HEAD') or path.startswith('/lfs/')  # whose links the real one signs
        if not open_to_all and self.headers.get('authorization') != f'Bearer {TOKEN}':
            self._body()
            return self._json({'error': 'Invalid username or password.'}, 401)
        for method, pattern, action in self.ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return action(self, *match.groups())
        self._body()
        return self._json({'error': f'no {self.command} {path}'}, 404)

    def _validate_yaml(self) -> None:
        content = json.loads(self._body())['content']
        try:
            metadata = yaml.safe_load(content.split('---\n')[1])
            for _, results in (
                [model_index_to_eval_results(metadata['model-index'])] if 'model-index' in metadata else []
            ):
                assert all(r.metric_value is not None for r in results)
        except Exception as error:
            return self._json({'errors': [{'message': repr(error)}]}, 400)
        return self._json({})

    def _create(self) -> None:
        asked = json.loads(self._body())
        name = f'{asked["organization"]}/{asked["name"]}'
        if asked['organization'] == 'forbidden':
            return self._json({'error': 'no right'}, 403)
        with self.server.lock:
            exists = name in self.server.repositories
            if not exists:
                repository = self.server.repositories[name] = Repository()
                repository.commit({'.gitattributes': self.server.put(b'*.safetensors filter=lfs\n')})
        return self._json({'url': f'{self.server.url}/{name}'}, 409 if exists else 200)

    def _info(self, name: str, revision: str | None = None) -> None:
        commit = self._commit_of(name, revision or 'main')
        if commit is None:
            return
        sha, files = commit
        lfs = self.server.repositories[name].lfs
        siblings = []
        for path, sha256 in files.items():
            content = self.server.blobs / sha256
            size = content.stat().st_size
            entry = {'rfilename': path, 'size': size}
            if sha256 in lfs:
                entry |= {'blobId': sha256[:40], 'lfs': {'sha256': sha256, 'size': size, 'pointerSize': 134}}
            else:
                entry['blobId'] = hashlib.sha1(b'blob %d\0' % size + content.read_bytes()).hexdigest()  # noqa: S324
            siblings.append(entry)
        self._json({'_id': name, 'id': name, 'modelId': name, 'sha': sha, 'private': False, 'siblings': siblings})

    def _tree(self, name: str, revision: str) -> None:
        commit = self._commit_of(name, revision)
        if commit is not None:
            self._json([{'type': 'file', 'path': p, 'size': 0, 'oid': s[:40]} for p, s in commit[1].items()])

    def _preupload(self, name: str, revision: str) -> None:
        files = json.loads(self._body())['files']
        modes = [
            {
                'path': file['path'],
                'uploadMode': 'lfs' if file['path'].endswith('.safetensors') else 'regular',
                'shouldIgnore': False,
            }
            for file in files
        ]
        if self._commit_of(name, revision) is not None:
            self._json({'files': modes})

    def _lfs_batch(self, name: str) -> None:
        objects = []
        for asked in json.loads(self._body())['objects']:
            entry = {'oid': asked['oid'], 'size': asked['size']}
            if not (self.server.blobs / asked['oid']).exists():
                entry['actions'] = {'upload': {'href': f'{self.server.url}/lfs/{asked["oid"]}'}}
            objects.append(entry)
        self._json({'transfer': 'basic', 'objects': objects})

    def _lfs_put(self, oid: str) -> None:
        """A large file takes its place whole, or not at all."""
        partial = self.server.blobs / f'{oid}.{threading.get_ident()}'
        digest, left = hashlib.sha256(), int(self.headers['content-length'])
        with partial.open('wb') as file:
            while left:
                if self._cut_now(int(self.headers['content-length']) - left):
                    return
                time.sleep(self.server.delay_s)
                chunk = self.rfile.read(min(_CHUNK, left))
                if not chunk:
                    return
                digest.update(chunk)
                file.write(chunk)
                left -= len(chunk)
        if digest.hexdigest() != oid:
            return self._json({'error': 'wrong content'}, 400)
        partial.rename(self.server.blobs / oid)
        return self._json({})

    def _commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        with self.server.lock:
            repository = self.server.repositories[name]
            parent, files = repository.commits[-1]
            files = dict(files)
            for line in lines:
                value = line['value']
                if line['key'] == 'header' and value.get('parentCommit', parent) != parent:
                    return self._json({'error': 'the branch has moved'}, 412)
                if line['key'] == 'file':
                    files[value['path']] = self.server.put(base64.b64decode(value['content']))
                elif line['key'] == 'lfsFile':
                    if not (self.server.blobs / value['oid']).exists():
                        return self._json({'error': f'no object {value["oid"]}'}, 400)
                    files[value['path']] = value['oid']
                    repository.lfs.add(value['oid'])
                elif line['key'] == 'deletedFile':
                    del files[value['path']]
            oid = repository.commit(files)
        return self._json({'commitUrl': f'{self.server.url}/{name}/commit/{oid}', 'commitOid': oid})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit_of(name, revision)
        if commit is None:
            return
        sha, files = commit
        if path in files:
            self._send(files[path], {'X-Repo-Commit': sha, 'ETag': f'"{files[path]}"'})
        else:
            self._json({'error': 'Entry not found'}, 404, {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': sha})

    def _web(self, path: str) -> None:
        if path in self.server.files:
            self._send(self.server.files[path], {})
        else:
            self._json({'error': 'no such file'}, 404)

    def _send(self, sha256: str, headers: dict[str, str]) -> None:
        blob = self.server.blobs / sha256
        size, begin = blob.stat().st_size, 0
        if ranged := re.match(r'bytes=(\d+)-', self.headers.get('range', '')):
            begin = int(ranged.group(1))
        self.send_response(206 if begin else 200)
        for name, value in (headers | {'Content-Length': str(size - begin)}).items():
            self.send_header(name, value)
        if begin:
            self.send_header('Content-Range', f'bytes {begin}-{size - 1}/{size}')
        self.end_headers()
        if self.command == 'HEAD':
            return
        with blob.open('rb') as file:
            file.seek(begin)
            while chunk := file.read(_CHUNK if self.fault is None else 4096):
                self.wfile.write(chunk)
                if self._cut_now(file.tell()):
                    return

    ROUTES = (
        ('POST', r'/api/validate-yaml', _validate_yaml),
        ('POST', r'/api/repos/create', _create),
        ('GET', r'/api/models/([^/]+/[^/]+)', _info),
        ('GET', r'/api/models/([^/]+/[^/]+)/revision/([^/]+)', _info),
        ('GET', r'/api/models/([^/]+/[^/]+)/tree/([^/]+)', _tree),
        ('POST', r'/api/models/([^/]+/[^/]+)/preupload/([^/]+)', _preupload),
        ('POST', r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', _lfs_batch),
        ('PUT', r'/lfs/([0-9a-f]+)', _lfs_put),
        ('POST', r'/api/models/([^/]+/[^/]+)/commit/([^/]+)', _commit),
        ('HEAD', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', _resolve),
        ('GET', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', _resolve),
        ('GET', r'/web/(.+)', _web),
    )

    # ------------------------------------------------------------------------------------------ answers

    def _commit_of(self, name: str, revision: str) -> tuple[str, dict[str, str]] | None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self._json({'error': 'Repository not found'}, 404, {'X-Error-Code': 'RepoNotFound'})
            return None
        commit = repository.at(revision)
        if commit is None:
            self._json({'error': 'Invalid rev id'}, 404, {'X-Error-Code': 'RevisionNotFound'})
        return commit

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get('content-length', 0)))

    def _cut_now(self, done: int) -> bool:
        if self.fault is None or self.fault.after_bytes is None or done < self.fault.after_bytes:
            return False
        self._cut()
        return True

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.fault and self.fault.drop_answer:
            return self._cut()
        body = b'' if self.command == 'HEAD' else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None
