"""Runs a TLS server on the loopback interface, and the authority that signed its certificate."""

import datetime
import ipaddress
import socket
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.unit.test_fetching import Handler, Server

NAMED, UNNAMED = ["localhost", "127.0.0.1", "127.0.0.5", "127.0.0.6"], "127.0.0.7"  # in the server's certificate, and not


def signed(folder: Path) -> ssl.SSLContext:
    """Creates an authority (`ca.pem`), and the context of a server with a certificate from it for the hosts in NAMED."""

    def name(value: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, value)])

    def certificate(subject: str, key: ec.EllipticCurvePublicKey, extension: x509.ExtensionType) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        made = x509.CertificateBuilder(name("authority"), name(subject), key, x509.random_serial_number(),
                                       now - datetime.timedelta(1), now + datetime.timedelta(1))  # fmt: skip
        return made.add_extension(extension, critical=True).sign(authority, hashes.SHA256())

    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    hosts = [x509.DNSName(h) if h == "localhost" else x509.IPAddress(ipaddress.ip_address(h)) for h in NAMED]
    ca = certificate("authority", authority.public_key(), x509.BasicConstraints(ca=True, path_length=0))
    server = certificate("server", own.public_key(), x509.SubjectAlternativeName(hosts))
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    plain = own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(server.public_bytes(pem) + plain)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context


class Secure(Server):
    """Serves TLS at all loopback addresses. The handshake runs in the thread of each request."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__()
        self.socket.close()
        self.socket = socket.create_server(("", 0), backlog=64)
        self.server_address, self.context = self.socket.getsockname(), context

    def finish_request(self, request, client_address) -> None:
        with self.context.wrap_socket(request, server_side=True) as secured:
            Handler(secured, client_address, self)

    def url(self, path: str, host: str = "localhost") -> str:
        return f"https://{host}:{self.server_address[1]}{path}"
