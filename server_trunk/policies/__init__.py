"""Which of the waiting forwards run next. One policy a file, chosen by the name in the config."""

from server_trunk.policies.client_batching import ClientBatching
from server_trunk.policies.one_client import OneClient
from server_trunk.policies.policy import Policy
from server_trunk.policies.serial import Serial

__all__ = ["POLICIES", "ClientBatching", "OneClient", "Policy", "Serial"]

POLICIES: dict[str, type[Policy]] = {
    "client-batching": ClientBatching,
    "serial": Serial,
    "one-client": OneClient,
}
