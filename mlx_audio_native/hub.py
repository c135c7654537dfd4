"""Models by hub id, `OWNER/NAME` or `OWNER/NAME@REVISION`, fetched by huggingface_hub, which is an extra.

What its cache holds whole serves without asking the hub again: an id keeps its meaning, and offline is no other case.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType

from .config import TEXT_ENCODER, read_config
from .errors import HubError
from .names import t5_prefix
from .schema import nearest
from .tensorfile import open_tensors

KNOWN = ("stabilityai/stable-audio-open-small", "stabilityai/stable-audio-open-1.0", "google-t5/t5-base")
_NAME = r"\w+(?:[.-]\w+)*"
_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([\w./-]+))?", re.ASCII)
_WEIGHTS = "model.safetensors"
_BESIDE_WEIGHTS = ("config.json", "model_config.json", "spiece.model")
_LICENCE = re.compile(r"(licen[cs]e|notice)[^/\\]*", re.IGNORECASE)
_T5 = tuple(f"{TEXT_ENCODER}/{name}" for name in ("config.json", "spiece.model", _WEIGHTS))


def resolve(source: str | Path) -> Path:
    """The local folder of a model: `source` itself, unless it is a string that names nothing here but may be an id.

    An id's folder lies in the hub's cache, with the files that a model folder or a T5 is made of, and the licences. The
    first use fetches them, going on where an earlier one broke off. Raises HubError.
    """
    match = _ID.fullmatch(source) if isinstance(source, str) and not os.path.lexists(source) else None
    return _fetch(*match.groups()) if match else Path(source)


def text_encoder(folder: Path) -> Path:
    """Where the T5 of a model folder lies if its own weights hold none.

    That is beside them, or, for a checkpoint from the hub that comes without, the T5 that its config names, which is
    then fetched too. Raises HubError, ConfigError or WeightsError.
    """
    beside = folder / TEXT_ENCODER
    if _pinned_id(folder) is None or beside.is_dir():
        return beside
    prompt = read_config(folder, ("conditioner",)).prompt
    if any(name.startswith(t5_prefix(prompt.id)) for name in open_tensors(folder / _WEIGHTS)):
        return beside
    t5 = prompt.t5_model_name
    return resolve(t5 if "/" in t5 else f"google-t5/{t5}")


def name(folder: Path) -> str:
    """A model folder's name; for one in the hub's cache `OWNER/NAME@COMMIT`, which loads the same again anywhere."""
    return _pinned_id(folder) or folder.resolve().name


def _pinned_id(folder: Path) -> str | None:
    """From the cache's own layout, models--OWNER--NAME/snapshots/COMMIT."""
    *_, repository, snapshots, commit = ("", "", *folder.resolve().parts)
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    return f"{repository.removeprefix('models--').replace('--', '/')}@{commit}"


def _fetch(id_: str, revision: str | None) -> Path:
    hub = _client(id_)
    page = f"{hub.constants.ENDPOINT}/{id_}"
    try:
        cached = hub.try_to_load_from_cache(id_, _WEIGHTS, revision=revision)
        if isinstance(cached, str) and _is_whole(Path(cached).parent):
            return Path(cached).parent
        listed = hub.HfApi().model_info(id_, revision=revision, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
        first, *rest = _wanted(id_, {file.rfilename for file in listed.siblings})
        # only the first is asked for by the revision's name: the cache keeps its commit, and the rest is of that one
        folder = Path(hub.hf_hub_download(id_, first, revision=revision)).parent
        for file in rest:
            hub.hf_hub_download(id_, file, revision=folder.name)
        return folder
    except hub.errors.GatedRepoError:
        problem = f"{id_} is gated: accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
    except hub.errors.RepositoryNotFoundError:
        problem = (
            f"there is no folder {id_} here, and no model at {page} that this login may see{nearest(id_, list(KNOWN))}"
        )
    except hub.errors.RevisionNotFoundError:
        problem = f"{id_} has no revision {revision!r}; {page}/commits/main lists them"
    except hub.errors.OfflineModeIsEnabled:
        problem = f"{id_} is not whole in the hub's cache, and HF_HUB_OFFLINE is set: fetch it once without that"
    except hub.errors.HfHubHTTPError as error:
        login = "; `hf auth login` renews the login" if error.response.status_code == 401 else ""
        problem = f"cannot fetch {id_}: {_line(error)}{login}"
    except (OSError, ValueError, hub.errors.HTTPError) as error:  # ValueError: a name or an answer that is malformed
        reason = _line(error.__cause__ or error)
        problem = f"cannot fetch {id_}: {reason}; run it again to go on from there, or name a folder that is here"
    raise HubError(problem)


def _is_whole(folder: Path) -> bool:
    """Whether all that a model takes is there beside its weights: other programs fetch less than this one."""
    there = {file for file in _BESIDE_WEIGHTS if (folder / file).is_file()}
    return "model_config.json" in there or {"config.json", "spiece.model"} <= there


def _wanted(id_: str, listed: set[str]) -> list[str]:
    """What to fetch, the weights last: with them there, the rest is."""
    if _WEIGHTS not in listed:
        raise HubError(f"{id_} has no {_WEIGHTS}; weights are read from safetensors files alone")
    small = [file for file in sorted(listed) if file in _BESIDE_WEIGHTS or _LICENCE.fullmatch(file)]
    return [*small, *(_T5 if listed.issuperset(_T5) else ()), _WEIGHTS]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _client(id_: str) -> ModuleType:
    # its other transport starts a broken download again from nothing
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        message = f"there is no folder {id_} here; as a hub id it takes an extra: pip install '.[hub]' in the clone"
        raise HubError(message) from error
    return huggingface_hub
