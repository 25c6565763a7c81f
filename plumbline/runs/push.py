"""What was exported, onto the Hugging Face hub: `plumbline export --push`."""

from pathlib import Path

from plumbline.config.hub import is_hub_name
from plumbline.errors import UserError, in_one_line

_TOKEN = "`hf auth login`, or HF_TOKEN, gives one that may write"


def check_push(name: str) -> None:
    """Whether a model can be pushed as `name`, as far as that can be known without asking the hub.

    Raises:
        UserError: it is no name of a model, there is no token, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_token

    if not is_hub_name(name):
        raise UserError(f"--push {name}: no name of a model on the hub; write ORG/MODEL, or your user's name for ORG")
    if constants.is_offline_mode():
        raise UserError(f"--push {name}: HF_HUB_OFFLINE is set; unset it, or push later: `hf upload {name} OUT`")
    if not get_token():
        raise UserError(f"--push {name}: no token for {constants.ENDPOINT}; {_TOKEN}")


def push_model(out: Path, name: str, message: str) -> str:
    """Push the directory `out` as one commit; one that is not there yet is made, private. Returns its address.

    Raises:
        UserError: the hub cannot be reached, or refuses it. `out` stays as it is.
    """
    from huggingface_hub import HfApi, constants, errors

    try:
        address = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=out, commit_message=message)
        private = HfApi().model_info(name).private
    except Exception as error:  # huggingface_hub raises a dozen kinds, its own, httpx's and OSError
        later = f"{out} is whole; push it again by: hf upload {name} {out}"
        said, token = f"{type(error).__name__}: {error}", ""
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            said = f"refuses it ({status}: {error.server_message or in_one_line(error)})"
            token = f"; {_TOKEN} there" if status in (401, 403) else ""
        raise UserError(f"--push {name}: {constants.ENDPOINT}: {' '.join(said.split())}{token}; {later}") from error
    return f"{address} ({'private' if private else 'public'})"
