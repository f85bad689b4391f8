"""Download and unpack released weights: lbae/download.sh LIST... [--to FOLDER] [--from FILE].

A line of a list is "URL file sha256"; blank lines and lines that start with # are skipped. A download goes to
<file>.part, which a later call continues, and takes its name when complete and of the right digest. The archive (zip or
tar) is checked member by member, unpacked beside its destination, moved there in one step, and removed.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from common.datasets import prepare
from common.datasets.download import Remote, digest_of, fetch
from common.errors import UserError, run_command
from common.options import Options, from_flags, option
from lbae.options import Text

HERE = Path(__file__).resolve().parent


class DownloadOptions(Options):
    """The options of download.py."""

    to: Text = option(str(HERE), "folder to unpack into")
    file: Text = option("", "the archive of the list's only line, got by hand", flags=["--from"])
    dry_run: bool = option(False, "check the options and the lists, print the options as JSON and leave")


@dataclass
class Item:
    """One line of a list; `sha256` is empty when nobody published it."""

    url: str
    name: str
    sha256: str


def read_list(path: Path) -> list[Item]:
    """The items of a list file. Raises UserError naming the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the list {path} ({error})") from error
    items = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) not in (2, 3) or not words[0].startswith(("http://", "https://")):
            raise UserError(f"{path}, line {number}: expected 'URL file sha256'")
        name, digest = words[1], words[2].lower() if len(words) == 3 and words[2] != "-" else ""
        if name != Path(name).name or name.startswith("."):
            raise UserError(f"{path}, line {number}: '{name}' must be a plain file name")
        if digest and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
            raise UserError(f"{path}, line {number}: '{words[2]}' is no SHA-256 digest (64 hexadecimal digits)")
        items.append(Item(words[0], name, digest))
    if not items:
        raise UserError(f"{path} lists nothing to download")
    return items


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack a zip or tar into `folder` and return what appeared at its top level.

    Raises UserError, with nothing written, for something that is no archive, a damaged one, and members that are links,
    devices, absolute or lead outside; and when a name exists in `folder` already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as name:
        prepare.unpack(archive, Path(name))
        members = sorted(Path(name).iterdir())
        for member in members:
            if (folder / member.name).exists():
                raise UserError(f"{folder / member.name} exists; move it away, then unpack {archive} again")
        for member in members:
            shutil.move(member, folder / member.name)
    return [folder / member.name for member in members]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    options, _ = from_flags(DownloadOptions, argv[first:], __doc__)
    if not argv[:first]:
        raise UserError("name a list, such as lbae/model_weights_urls.txt, before the options; --help says more")
    items = [item for path in argv[:first] for item in read_list(Path(path))]
    if options.dry_run:
        print(json.dumps(options.as_dict(), indent=2))
        return
    if options.file and len(items) > 1:
        raise UserError(f"--from gives one archive, the list names {len(items)}: give a list of its line alone")
    folder = Path(options.to)
    for item in items:
        archive = Path(options.file)
        if not options.file:
            archive = fetch(Remote(item.name, (item.url,), "sha256", item.sha256 or None), folder, attempts=1)
        elif not archive.is_file():
            raise UserError(f"no such file: {archive}")
        elif item.sha256 and digest_of(archive, "sha256") != item.sha256:
            raise UserError(f"{archive}: its sha256 is not the one listed for {item.name}; get it again")
        if not item.sha256:
            print(f"{item.name}: no digest is listed; sha256 {digest_of(archive, 'sha256')}", file=sys.stderr)
        for path in unpack(archive, folder):
            print(path)
        if not options.file:
            archive.unlink()


if __name__ == "__main__":
    sys.exit(run_command(main))
