"""An index as an HTTP service. Needs the extra `serve`; the client the extra `client`."""
