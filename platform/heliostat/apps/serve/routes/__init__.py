"""Lists the routes that replicas answer. Each module defines one route: the request's body, its checks, the replica's work, and
the answer."""

from typing import Any

from heliostat.apps.serve.route import Route
from heliostat.apps.serve.routes.chat import ChatRoute
from heliostat.apps.serve.routes.completions import CompletionsRoute
from heliostat.apps.serve.routes.embeddings import EmbeddingsRoute
from heliostat.apps.serve.routes.images import ImagesRoute
from heliostat.apps.serve.routes.search import SearchRoute

ROUTES: dict[str, Route[Any, Any]] = {
    route.path: route for route in (CompletionsRoute(), ChatRoute(), EmbeddingsRoute(), ImagesRoute(), SearchRoute())
}
