"""A small client of Tryton's JSON-RPC, on the standard library alone."""

import base64
import json
import time
import urllib.error
import urllib.request


def decimal(value):
    return {"__class__": "Decimal", "decimal": str(value)}


def date(day):
    return {"__class__": "date", "year": day.year, "month": day.month, "day": day.day}


class Failed(Exception):
    """The server refused: `error` is what it said."""

    def __init__(self, method, error):
        super().__init__(f"{method}: {error}")
        self.error = error


def request(method, url, body=None, headers=None, timeout=60):
    """One HTTP request; gives (status, parsed JSON or text)."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    try:
        with urllib.request.urlopen(
                urllib.request.Request(url, data=data, headers=headers, method=method), timeout=timeout) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


class Tryton:
    def __init__(self, address, database, user="admin", password="admin"):
        self.address, self.database, self.user = address, database, user
        self.context = {}
        uid, token, *_ = self._call("common.db.login", [user, {"password": password}])
        self.uid = uid
        self.session = base64.b64encode(f"{user}:{uid}:{token}".encode()).decode()

    def _call(self, method, params, headers=None):
        url = f"http://{self.address}/{self.database}/rpc/"
        status, answer = request("POST", url, {"id": 1, "method": method, "params": params}, headers)
        if status != 200 or not isinstance(answer, dict) or "error" in answer:
            raise Failed(method, answer.get("error", answer) if isinstance(answer, dict) else f"{status} {answer}")
        return answer["result"]

    def call(self, method, *params, **context):
        headers = {"Authorization": f"Session {self.session}"}
        return self._call(method, [*params, {**self.context, **context}], headers)

    def create(self, model, *values):
        return self.call(f"model.{model}.create", list(values))

    def write(self, model, ids, values):
        return self.call(f"model.{model}.write", ids, values)

    def search(self, model, domain, fields=("id",), order=None, limit=None):
        return self.call(f"model.{model}.search_read", domain, 0, limit, order, list(fields))

    def application_key(self):
        """A confirmed bearer key for the REST interface."""
        url = f"http://{self.address}/{self.database}/r/user/application/"
        status, key = request("POST", url, {"user": self.user, "application": "rest"})
        if status != 200:
            raise Failed("application key", f"{status} {key}")
        found = self.search("res.user.application", [["key", "=", key], ["state", "=", "requested"]])
        self.call("model.res.user.application.validate_", [found[0]["id"]])
        return key


def wait_until_up(address, deadline=60):
    end = time.monotonic() + deadline
    while True:
        try:
            urllib.request.urlopen(f"http://{address}/", timeout=5)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
