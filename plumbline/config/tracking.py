"""The section of a config that says which experiment trackers get a run's figures."""

from urllib.parse import urlsplit

from pydantic import Field, model_validator

from plumbline.config.section import Section


class Wandb(Section):
    """Weights & Biases. Its key and server are taken from its own environment variables or its own login."""

    project: str = Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$", description="made where there is none")


class Mlflow(Section):
    """MLflow. A user's name and password are taken from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    uri: str = Field(min_length=1, description="the tracking server, such as http://host:5000, or sqlite:///runs.db")
    experiment: str = Field(default="plumbline", min_length=1, max_length=250, description="made where there is none")

    @model_validator(mode="after")  # of the section: an error of the key would show what was given
    def _no_secret(self) -> "Mlflow":
        if urlsplit(self.uri).password is not None:
            raise ValueError(
                "`uri` holds a password, which a run would keep in its config.yaml; leave it out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return self


class Tracking(Section):
    """Experiment trackers that a run's figures go to, beside its own events.jsonl."""

    tensorboard: bool = Field(default=True, description="event files in RUN_DIR/tensorboard")
    wandb: Wandb | None = None
    mlflow: Mlflow | None = None
