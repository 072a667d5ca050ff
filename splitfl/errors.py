"""Every error splitfl raises, on one page.

Three questions order the tree: who can mend it (the user, this program, the peer), does the session survive, and what exit
code does a command end with. A command prints the message of a :class:`SplitflError` as one sentence, without a traceback.
"""

from __future__ import annotations


class SplitflError(Exception):
    """The root. ``exit_code`` is what a command ends with when this error reaches the top."""

    exit_code = 1


# --- The user can mend it: one clear sentence that names the mend; exit code 2. -------------------------------------------------


class UserError(SplitflError):
    """A mistake in what the user gave: the message is one sentence with the mend."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is missing, unknown, or contradicts another."""


class ModelError(UserError):
    """A model cannot be found, split or loaded; or the two sides hold different models."""


class DataError(UserError):
    """A data file cannot be read; the message names the file and the row."""


class KeyFileError(UserError):
    """A key or an ``authorized_clients`` file is missing, malformed or readable by others."""


class CheckpointError(UserError):
    """A run directory or checkpoint is missing, damaged or belongs to another model."""


class NotWritten(CheckpointError):
    """A checkpoint could not be written, as the disk is full, say: the one before it stands."""


class NotReadable(CheckpointError):
    """A checkpoint cannot be read here, though nothing says that it is damaged: another version has written it, or the system
    refuses. So nobody puts it aside, or goes on from an older one in its place.
    """


class RunComplete(UserError):
    """The run has made all its steps, so no step can be taken part in; evaluation goes on working."""


# --- One trunk on several ranks: whoever started them starts them again. --------------------------------------------------------


class GroupLost(SplitflError):
    """A rank of a trunk, or a replica, is gone, or holds another state than the others: nothing more can be run."""


# --- Connecting: the user can mend it too, with the operator's help. ------------------------------------------------------------


class ConnectError(UserError):
    """No session could be opened: nothing listens there, the key is wrong, or the server stayed silent."""


class Refused(ConnectError):
    """The peer said no. ``code`` is a short machine-readable word (see ``splitfl.protocol.messages.RefusalCode``)."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


# --- The channel: either this program broke its own rules, or the peer did. -----------------------------------------------------


class ChannelError(SplitflError):
    """Something went wrong on an open channel."""


class LocalProtocolError(ChannelError):
    """This program asked the protocol for something its state forbids: a bug here, never the peer's doing."""


class RemoteProtocolError(ChannelError):
    """The peer sent bytes the protocol forbids: its session ends, nothing else does."""


class OutOfTurn(RemoteProtocolError):
    """A message that is well formed, where the session's state has no place for it: also what follows on one that was lost."""


class SealError(RemoteProtocolError):
    """A record's tag did not verify, or its header is not the expected one. The session cannot go on."""


class SessionLost(ChannelError):
    """The session ended before the work was done: the link broke, or the peer closed it. ``code`` says which."""

    def __init__(self, text: str, code: str = "lost") -> None:
        super().__init__(text)
        self.code = code


class StepMissed(ChannelError):
    """The run's step went on without this client, which was late. The session stays: drop the gradients of this step and go on
    with the next batch, which takes part in the next step. What had counted by then stays in the trunk's step.
    """


class CacheLost(ChannelError):
    """The trunk has no longer the keys and values that a decoding forward was to follow: they were evicted, or went with a lost
    session. Whoever decodes sends the whole prefix again.
    """


class RunWentBack(ChannelError):
    """The run goes on from step ``step``, before which this client does not stand any more: its server was started again from an
    older checkpoint. Load what was kept of the ends after the step before (see ``model.on_checkpoint``) and repeat from there;
    the model goes on working.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"the run went back to step {step}: load the ends as they were before it, and repeat from there")
        self.step = step


# --- What others raise. ---------------------------------------------------------------------------------------------------------


def in_one_line(error: BaseException) -> str:
    """All that an error says, as a part of a sentence, at most 300 characters; its kind where it says nothing. For what says the
    reason in a line of its own, as a config of transformers' that is not valid.
    """
    return _short(str(error), error)


def first_line(error: BaseException) -> str:
    """What an error says first, as a part of a sentence, at most 300 characters; its kind where it says nothing."""
    return _short(str(error).strip().partition("\n")[0], error)


def kind_and_line(error: BaseException) -> str:
    """An error's kind and what it says first, ``ValueError: too large``; the kind alone where it says nothing."""
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"


def _short(said: str, error: BaseException) -> str:
    return " ".join(said.split())[:300] or type(error).__name__
