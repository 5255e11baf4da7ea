#!/usr/bin/env python3
"""Makes and shows a JetStream stream with Python's standard library alone, for machines without the nats tool.

    stream.py PORT add STREAM SUBJECTS      as `nats stream add STREAM --subjects=SUBJECTS` with every default
    stream.py PORT view STREAM [COUNT]      waits until it holds COUNT messages, then prints them all:
                                            number, subject, Nats-Msg-Id and body, as `nats stream view` does
"""

import base64
import json
import socket
import sys
import time

# how long the server may take for an answer, and the relay for the messages that are waited for
ANSWER_SECONDS = 10
VIEW_SECONDS = 30


class Server:
    """As much of the NATS protocol as one request at a time needs."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS)
        self.file = self.socket.makefile("rb")
        self.socket.sendall(b'CONNECT {"verbose":false}\r\nSUB _INBOX.demo 1\r\n')

    def call(self, api, body=None):
        """The answer to `$JS.API.<api>`, which may be an error."""
        payload = b"" if body is None else json.dumps(body).encode()
        head = f"PUB $JS.API.{api} _INBOX.demo {len(payload)}\r\n".encode()
        self.socket.sendall(head + payload + b"\r\n")
        while True:
            line = self.file.readline()
            words = line.split()
            if not line or line.startswith(b"-ERR"):
                raise ConnectionError(f"nats-server: {line.decode().strip() or 'connection closed'}")
            if words[0] == b"PING":
                self.socket.sendall(b"PONG\r\n")
            elif words[0] == b"MSG":
                return json.loads(self.file.read(int(words[-1]) + 2))


def checked(answer):
    if "error" in answer:
        sys.exit(f"stream.py: {answer['error']['description']}")
    return answer


def add(server, stream, subjects):
    checked(server.call(f"STREAM.CREATE.{stream}", {"name": stream, "subjects": [subjects]}))


def view(server, stream, count="0"):
    deadline = time.monotonic() + VIEW_SECONDS
    while True:
        state = checked(server.call(f"STREAM.INFO.{stream}"))["state"]
        if state["messages"] >= int(count):
            break
        if time.monotonic() > deadline:
            sys.exit(f"stream.py: {stream} holds {state['messages']} of {count} messages after {VIEW_SECONDS} s")
        time.sleep(0.05)
    for seq in range(state["first_seq"], state["last_seq"] + 1):
        show(checked(server.call(f"STREAM.MSG.GET.{stream}", {"seq": seq}))["message"])


def show(message):
    print(f"[{message['seq']}] Subject: {message['subject']} Received: {message['time']}\n")
    headers = base64.b64decode(message.get("hdrs", "")).decode()
    for line in headers.split("\r\n"):
        name, _, value = line.partition(":")
        if name == "Nats-Msg-Id":
            print(f"  {name}: {value.strip()}\n")
    print(base64.b64decode(message.get("data", "")).decode())


def main():
    match sys.argv[1:]:
        case [port, "add", stream, subjects]:
            add(Server(int(port)), stream, subjects)
        case [port, "view", stream, *count] if len(count) < 2:
            view(Server(int(port)), stream, *count)
        case _:
            sys.exit(__doc__)


main()
