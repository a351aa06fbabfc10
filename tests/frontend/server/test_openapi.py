"""Requests made up from our own OpenAPI document: none may break the server or its promises."""

import asyncio
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from nanovllm.frontend.server.settings import ServerSettings
from tests.frontend.fake_core import FakeCore, echo
from tests.frontend.server.served import make_app
