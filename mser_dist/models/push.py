"""An export given to a model hub, by huggingface_hub. HF_ENDPOINT names another hub than huggingface.co."""

from pathlib import Path

from mser_dist.errors import UserError
from mser_dist.models.exported import check_files, read_card


def push(export: Path, name: str, private: bool = False) -> str:
    """Upload an export as the model `name` (owner/model) and return its address; what a hub has already is not sent.

    Raises `UserError` for a damaged export, and for a hub that refuses or does not answer.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    check_files(export, read_card(export))
    hub = huggingface_hub.HfApi()
    where = f"{name} at {hub.endpoint}"
    try:
        made = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=made.repo_id, folder_path=export, commit_message="mser push")
    except HFValidationError as error:
        raise UserError(f"{name} is no name of a model on a hub ({_line(error)}): give it as OWNER/MODEL") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{where}: HF_HUB_OFFLINE is set, so that nothing is sent: unset it") from error
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        remedy = "log in by `hf auth login` or HF_TOKEN, with a token that may write there"
        if code not in (401, 403, 404):
            remedy = "try again later; what was sent is not sent again"
        raise UserError(f"{where}: the hub refused ({_line(error)}): {remedy}") from error
    except (OSError, huggingface_hub.errors.LocalTokenNotFoundError) as error:
        raise UserError(f"{where}: the hub cannot be reached ({_line(error)}): see HF_ENDPOINT and HF_TOKEN") from error
    except Exception as error:  # its transport (httpx) has errors of its own, which are no OSError
        if not type(error).__module__.startswith("httpx"):
            raise
        raise UserError(f"{where}: the hub cannot be reached ({_line(error)}): see HF_ENDPOINT") from error
    return str(made)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
