"""A hook of mkdocs: the pages show the pictures of benchmarks/results, which lie beside docs/, where they lie."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = Path("benchmarks", "results")


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures to the site."""
    root = Path(config.config_file_path).parent
    for picture in sorted((root / RESULTS).glob("*/*.png")):
        files.append(File(picture.relative_to(root).as_posix(), str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to them, as if they lay in docs/."""
    return markdown.replace(f"](../{RESULTS.as_posix()}/", f"]({RESULTS.as_posix()}/")
