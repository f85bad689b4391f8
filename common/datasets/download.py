"""Downloads that resume, refuse web pages, and take their name only when their digest is right."""

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError, is_web_page

PIECE = 1 << 20
TIMEOUT = 60.0


@dataclass(frozen=True)
class Remote:
    """A published file: its name, its addresses in order of preference, and its digest (or its first digits) when one
    is known.
    """

    file: str
    urls: tuple[str, ...]
    algorithm: str = "sha256"
    digest: str | None = None


def digest_of(path: Path, algorithm: str) -> str:
    """The hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def reachable(url: str, seconds: float = 5.0) -> bool:
    """Whether a server gives the first byte of `url`."""
    request = urllib.request.Request(url, headers={"Range": "bytes=0-0"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return "html" not in response.headers.get_content_type()
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return False


def _receive(url: str, part: Path) -> None:
    """Download `url` into `part`, from its end when it has content already."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        return  # nothing beyond what is here: the digest decides
    with response:
        if "html" in response.headers.get_content_type():
            raise UserError(f"{url} answered with a web page, not the file: open it in a browser, then use --from")
        resumed = response.status == 206 and _resumes_at(response.headers.get("Content-Range", ""), have)
        length = response.headers.get("Content-Length")
        expected = None if length is None else int(length) + (have if resumed else 0)
        done = have if resumed else 0
        bar = tqdm(total=expected, initial=done, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with bar, open(part, "ab" if resumed else "wb") as file:
            while piece := response.read(PIECE):
                if done == 0 and is_web_page(piece):
                    raise UserError(
                        f"{url} answered with a web page, not the file: open it in a browser, then use --from"
                    )
                file.write(piece)
                done += len(piece)
                bar.update(len(piece))
    if expected is not None and done < expected:
        raise ConnectionError(f"the connection ended after {done:,} of {expected:,} bytes")


def _resumes_at(content_range: str, start: int) -> bool:
    found = re.match(r"bytes (\d+)-", content_range)
    return found is not None and int(found.group(1)) == start


def _check(part: Path, remote: Remote, record: Path, url: str) -> None:
    """Compare with the known digest, else with the one recorded at the first download (recording it)."""
    if remote.digest is not None:
        algorithm, wanted, origin = remote.algorithm, remote.digest, "published"
    elif record.is_file():
        algorithm, wanted, origin = "sha256", record.read_text(errors="replace")[:64], f"recorded in {record}"
    else:
        record.write_text(f"{digest_of(part, 'sha256')}  {remote.file}\n")
        return
    found = digest_of(part, algorithm)
    if not wanted or not found.startswith(wanted):
        part.unlink()
        raise UserError(f"{url}: the {algorithm} is {found}, {wanted} was {origin}: the file is not the published one")


def fetch(remote: Remote, folder: Path, mirror: str | None = None, attempts: int = 3) -> Path:
    """Download `remote` into `folder` and return its path; from `mirror`/<file> when given.

    A broken connection leaves `<file>.part`, from which the next attempt, or the next call, goes on. A file without a
    known digest gets its sha256 recorded in `<file>.sha256`, against which later downloads are checked. Raises
    UserError when no address delivers the file, for a web page in its place, and for a wrong digest.
    """
    target, part = folder / remote.file, folder / f"{remote.file}.part"
    record = folder / f"{remote.file}.sha256"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror})") from error
    if target.is_file() and (remote.digest is None or digest_of(target, remote.algorithm).startswith(remote.digest)):
        return target
    urls = (f"{mirror.rstrip('/')}/{remote.file}",) if mirror else remote.urls
    problem = "no address is known"
    for url in urls:
        for _ in range(attempts):
            try:
                _receive(url, part)
            except urllib.error.HTTPError as error:
                problem = f"{url}: {error.code} {error.reason}"
                error.close()
                break
            except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
                problem = f"{url}: {getattr(error, 'reason', error)}"
                continue
            _check(part, remote, record, url)
            part.replace(target)
            return target
    kept = f"; {part} is kept and the next run goes on from there" if part.exists() else ""
    raise UserError(f"cannot download {remote.file} ({problem}){kept}; or get it by hand and use --from FILE")
