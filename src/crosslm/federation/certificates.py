"""The certificates of a federation: that of its authority, and the server's, which the authority signs."""

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID_DAYS = 825
"""Of a server's certificate."""
AUTHORITY_DAYS = 3650
"""Of the authority's, which is at every silo: longer, or each new certificate of the server would want a new one of
the authority, and something brought to each silo."""
AUTHORITY = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "crosslm federation authority")])


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key as all parties of a federation have one."""
    return ec.generate_private_key(ec.SECP384R1())


def authority_certificate(key: ec.EllipticCurvePrivateKey, name: x509.Name = AUTHORITY) -> x509.Certificate:
    """What an authority says of itself. With the same key and name again, all that it has signed goes on counting."""
    return (
        _certificate(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_may_sign_certificates(), critical=True)  # without it Python 3.13 trusts nothing that it signs
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def server_certificate(
    address: str, key: CertificatePublicKeyTypes, authority_key: ec.EllipticCurvePrivateKey, authority: x509.Name
) -> x509.Certificate:
    """A certificate for the HOST of an address and for localhost, signed by an authority of this name."""
    host = address.rpartition(":")[0]
    names = [_general_name(name) for name in dict.fromkeys((host, "localhost", "127.0.0.1"))]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    # of the authority no certificate is named, but its key: a later one of the same key does as well
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        _certificate(subject, authority, key, VALID_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def pem(made: x509.Certificate | ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate or a private key as the text that is in its file."""
    if isinstance(made, x509.Certificate):
        return made.public_bytes(serialization.Encoding.PEM)
    pkcs8 = serialization.PrivateFormat.PKCS8
    return made.private_bytes(serialization.Encoding.PEM, pkcs8, serialization.NoEncryption())


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: CertificatePublicKeyTypes, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _may_sign_certificates() -> x509.KeyUsage:
    others = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    no = dict.fromkeys((*others, "encipher_only", "decipher_only"), False)
    return x509.KeyUsage(key_cert_sign=True, crl_sign=True, **no)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
